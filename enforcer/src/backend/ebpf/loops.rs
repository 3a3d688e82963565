//! What kernels before 6.8 ask of the programs' shape, looked for here, as the newer kernels that programs are built on
//! do not mind.

use std::collections::HashMap;

use aya_obj::{Object, generated::bpf_insn};

use super::load::PROGRAMS;

/// Instruction classes and operations (`linux/bpf_common.h`, `linux/bpf.h`).
const JMP: u8 = 5;
const JMP32: u8 = 6;
const JA: u8 = 0x00;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;

/// Where control goes from an instruction, and whether that way may close a loop: a jump's may, that to whatever comes
/// next may not.
fn ways(at: i64, instruction: bpf_insn) -> Vec<(i64, bool)> {
    let next = at + 1;
    let target = next + i64::from(instruction.off);
    if !matches!(instruction.code & 7, JMP | JMP32) {
        return vec![(next, false)];
    }
    match instruction.code & 0xf0 {
        EXIT => vec![],
        CALL => vec![(next, false)],
        JA => vec![(target, true)],
        _ => vec![(next, true), (target, true)],
    }
}

/// Loops that close otherwise than by a jump: the instructions between which they do. As `check_cfg` in
/// kernel/bpf/verifier.c walks.
fn closed_otherwise(instructions: &[bpf_insn]) -> Vec<(i64, i64)> {
    let mut found = Vec::new();
    // False while what comes after an instruction is being walked.
    let mut walked: HashMap<i64, bool> = HashMap::from([(0, false)]);
    let of = |at: i64| {
        let instruction = usize::try_from(at).ok().and_then(|at| instructions.get(at));
        instruction
            .map(|instruction| ways(at, *instruction))
            .unwrap_or_default()
            .into_iter()
    };
    let mut path = vec![(0, of(0))];
    while let Some((at, rest)) = path.last_mut() {
        let at = *at;
        let Some((to, may_close)) = rest.next() else {
            walked.insert(at, true);
            path.pop();
            continue;
        };
        match walked.get(&to) {
            Some(false) if !may_close => found.push((at, to)),
            Some(_) => {}
            None => {
                walked.insert(to, false);
                path.push((to, of(to)));
            }
        }
    }
    found
}

#[test]
fn loops_close_by_jumps() -> Result<(), Box<dyn std::error::Error>> {
    let object = Object::parse(PROGRAMS)?;
    let mut programs = 0;
    for function in object.functions.values() {
        assert_eq!(closed_otherwise(&function.instructions), [], "{}", function.name);
        programs += 1;
    }
    assert!(programs >= 4, "{programs} programs");
    Ok(())
}

/// That the walk finds what it looks for.
#[test]
fn a_loop_that_a_call_closes_is_found() {
    let instruction = |code: u8, off: i16| bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off,
        imm: 0,
    };
    // Into the loop at its end, which is a call: 1 jumps to 3; 3 to 2; 2 is the call, before 3.
    let closed = [
        instruction(0xb7, 0),
        instruction(0x05, 1),
        instruction(0x85, 0),
        instruction(0x15, -2),
        instruction(0x95, 0),
    ];
    assert_eq!(closed_otherwise(&closed), [(2, 3)]);
    let by_jump = [
        instruction(0xb7, 0),
        instruction(0x85, 0),
        instruction(0x15, -2),
        instruction(0x95, 0),
    ];
    assert_eq!(closed_otherwise(&by_jump), []);
}
