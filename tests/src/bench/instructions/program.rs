//! A program of the object, made to count its own instructions.
//!
//! rbpf counts none. So each instruction gets three before it: `r0` is put by below the program's own stack, a helper
//! is called that counts, and `r0` is taken back; jumps are made as much longer. What the program does stays the same.

use anyhow::{Context as _, Result, bail, ensure};
use aya_obj::{
    Object,
    generated::{BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE, bpf_insn},
};
use enforcer_ebpf::CAST;
use rbpf::{EbpfVmRaw, ebpf::INSN_SIZE};

use super::kernel::{self, HELPERS, Kernel, OFFSETS, Tally, Task};

/// The number of the helper that counts; the kernel has none of it.
const COUNT: i32 = 0x7fff;
/// Where `r0` is put by: below the 512 bytes that a program has.
const PUT_BY: i16 = -1024;
/// Instructions that stand before each.
const BEFORE: usize = 3;

/// Classes and operations of instructions (`linux/bpf_common.h`, `linux/bpf.h`).
const LOAD_WIDE: u8 = 0x18;
const JUMP: u8 = 5;
const JUMP32: u8 = 6;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;

/// A call of a socket as the programs see it (`struct bpf_sock_addr`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    /// 2 or 10: `AF_INET`, `AF_INET6`.
    pub(super) family: u32,
    /// The IPv4 address, or 0, and the IPv6 address, in network byte order.
    pub(super) address: (u32, [u8; 16]),
    /// In host byte order.
    pub(super) port: u16,
    /// IANA protocol number.
    pub(super) protocol: u32,
}

/// Entries of maps: name, key, value.
pub(super) type Entries<'a> = &'a [(&'a str, &'a [u8], &'a [u8])];

/// Runs a program of the object over a kernel with these maps, and says what it returned and did.
pub(super) fn run(object: &[u8], name: &str, entries: Entries<'_>, who: Task, call: Context) -> Result<(u64, Tally)> {
    let mut object = Object::parse(object)?;
    let offsets = OFFSETS.map(|(name, offset)| (name, offset.to_ne_bytes()));
    let mut globals: std::collections::HashMap<&str, (&[u8], bool)> = offsets
        .iter()
        .map(|(name, offset)| (*name, (offset.as_slice(), true)))
        .collect();
    // The task is read by its type, and nothing is traced.
    globals.insert("TYPED_TASK", (&[1, 0, 0, 0], true));
    if who.casts {
        globals.insert("SOCK_TYPE", (&[1, 0, 0, 0], true));
        globals.insert("TASK_TYPE", (&[1, 0, 0, 0], true));
    } else {
        // As the loader does: helpers then fill in the task's part of a denial's record.
        globals.insert("TASK_PID_OFFSET", (&[0; 4], true));
    }
    globals.insert("AYA_LOG_LEVEL", (&[0], true));
    object.patch_map_data(globals)?;

    let maps = object.maps.clone();
    let mut numbered: Vec<_> = maps.iter().collect();
    numbered.sort_unstable_by_key(|(name, _)| *name);
    let mut kernel = Kernel::new(who)?;
    for (name, map) in &numbered {
        let of_it = entries.iter().filter(|(of, _, _)| of == name).count();
        kernel.add_map(name, map, of_it)?;
    }
    for (map, key, value) in entries {
        kernel.put(map, key, value)?;
    }
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    let numbers = (0..).zip(&numbered).map(|(fd, (name, map))| (name.as_str(), fd, *map));
    object.relocate_maps(numbers, &sections)?;
    object.relocate_calls(&sections)?;

    let program = object
        .programs
        .get(name)
        .with_context(|| format!("no program {name}"))?;
    let function = object.functions.get(&program.function_key()).context("no function")?;
    let instructions = counting(&addressed(&function.instructions, &kernel)?, kernel.stack.range().end)?;

    fill(&kernel, call)?;
    let (ranges, context) = (kernel.ranges(), kernel.context.range());
    kernel::running(kernel, || execute(&instructions, ranges, &context))
}

/// Executes in rbpf's interpreter. Its own stack is not used: `r10` is made to point to ours.
fn execute(instructions: &[u8], ranges: Vec<std::ops::Range<u64>>, context: &std::ops::Range<u64>) -> Result<u64> {
    let mut machine = EbpfVmRaw::new(None)?;
    // The kernel's verifier has a better one: this one would mind that `r10` is written.
    machine.set_verifier(|_| Ok(()))?;
    machine.set_program(instructions)?;
    machine.register_helper(COUNT.cast_unsigned(), kernel::step)?;
    for (number, helper) in HELPERS {
        machine.register_helper(number, helper)?;
    }
    for range in ranges {
        machine.register_allowed_memory(range);
    }
    // The address of the context stands in the first word of what rbpf hands to the program.
    let mut first = context.start.to_ne_bytes();
    Ok(machine.execute_program(&mut first)?)
}

/// Writes the context (offsets of `struct bpf_sock_addr` in `linux/bpf.h`).
fn fill(kernel: &Kernel, call: Context) -> Result<()> {
    let context = &kernel.context;
    let (v4, v6) = call.address;
    context.put(0, &call.family.to_ne_bytes())?;
    context.put(4, &v4.to_ne_bytes())?;
    context.put(8, &v6)?;
    context.put(24, &u32::from(call.port.to_be()).to_ne_bytes())?;
    context.put(28, &call.family.to_ne_bytes())?;
    context.put(36, &call.protocol.to_ne_bytes())?;
    context.put(64, &kernel.socket().to_ne_bytes())
}

fn instruction(code: u8, registers: (u8, u8), off: i16, imm: i32) -> bpf_insn {
    bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(registers.0, registers.1),
        off,
        imm,
    }
}

/// An instruction that loads a number of 64 bits, in its two places.
#[allow(clippy::cast_possible_truncation, reason = "two halves of one word")]
fn load_wide(register: u8, value: u64) -> [bpf_insn; 2] {
    [
        instruction(LOAD_WIDE, (register, 0), 0, (value as u32).cast_signed()),
        instruction(0, (0, 0), 0, ((value >> 32) as u32).cast_signed()),
    ]
}

/// Maps by their numbers, and their values by address, as the kernel makes it when it loads a program.
fn addressed(instructions: &[bpf_insn], kernel: &Kernel) -> Result<Vec<bpf_insn>> {
    let mut all = instructions.to_vec();
    // Of a cast the kernel makes `r0 = r1`.
    let is_cast = |one: &&mut bpf_insn| one.code == (JUMP | CALL) && one.imm == CAST.cast_signed();
    for cast in all.iter_mut().filter(is_cast) {
        *cast = instruction(0xbf, (0, 1), 0, 0);
    }
    let mut at = 0;
    while let Some([first, second]) = all.get_mut(at..at + 2) {
        if first.code == LOAD_WIDE {
            let map = u64::from(first.imm.cast_unsigned());
            let value = match u32::from(first.src_reg()) {
                0 => None,
                BPF_PSEUDO_MAP_FD => Some(map),
                BPF_PSEUDO_MAP_VALUE => {
                    let values = kernel.values(usize::try_from(map)?).context("no such map")?;
                    Some(values + u64::from(second.imm.cast_unsigned()))
                }
                other => bail!("instruction {at} loads {other}, which is not emulated yet"),
            };
            if let Some(value) = value {
                [*first, *second] = load_wide(first.dst_reg(), value);
            }
            at += 1;
        }
        at += 1;
    }
    Ok(all)
}

/// The program with what counts before each instruction.
fn counting(instructions: &[bpf_insn], top_of_stack: u64) -> Result<Vec<u8>> {
    // r10 = the top of our stack; r1 = *(u64 *)(r1 + 0), the context.
    let mut prologue = load_wide(10, top_of_stack).to_vec();
    prologue.push(instruction(0x79, (1, 1), 0, 0));

    // Where the place of each instruction begins in what is made.
    let mut begins = Vec::with_capacity(instructions.len());
    let mut length = prologue.len();
    let mut second = false;
    for one in instructions {
        begins.push(length);
        length += if second { 1 } else { BEFORE + 1 };
        second = !second && one.code == LOAD_WIDE;
    }
    ensure!(
        i16::try_from(length).is_ok(),
        "{length} instructions are more than rbpf jumps over"
    );

    let mut made = prologue;
    second = false;
    for (at, one) in instructions.iter().enumerate() {
        let mut one = *one;
        if !second {
            made.extend([
                instruction(0x7b, (10, 0), PUT_BY, 0),
                instruction(JUMP | CALL, (0, 0), 0, COUNT),
                instruction(0x79, (0, 10), PUT_BY, 0),
            ]);
            if matches!(one.code & 7, JUMP | JUMP32) {
                let operation = one.code & 0xf0;
                let made_at = i64::try_from(made.len() + 1)?;
                let begins_at = |distance: i64| -> Result<i64> {
                    let to = usize::try_from(i64::try_from(at)? + 1 + distance)?;
                    Ok(i64::try_from(*begins.get(to).context("a jump out of the program")?)?)
                };
                match operation {
                    // Of a function of the program's own, not of a helper.
                    CALL if one.src_reg() != 0 => {
                        one.imm = i32::try_from(begins_at(one.imm.into())? - made_at)?;
                    }
                    CALL | EXIT => {}
                    _ => one.off = i16::try_from(begins_at(one.off.into())? - made_at)?,
                }
            }
        }
        second = !second && one.code == LOAD_WIDE;
        made.push(one);
    }
    Ok(made.into_iter().flat_map(bytes).collect())
}

fn bytes(one: bpf_insn) -> [u8; INSN_SIZE] {
    let [off_low, off_high] = one.off.to_le_bytes();
    let [a, b, c, d] = one.imm.to_le_bytes();
    [
        one.code,
        one.src_reg() << 4 | one.dst_reg(),
        off_low,
        off_high,
        a,
        b,
        c,
        d,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten times around, over a number that fills two places, with a call in `r0`'s way.
    #[test]
    fn each_instruction_counts_once() -> Result<()> {
        const LESS_THAN: u8 = 0xa5;
        let mut program = load_wide(1, 1 << 40).to_vec();
        program.extend([
            instruction(0xb7, (0, 0), 0, 0),
            instruction(0x07, (0, 0), 0, 1),
            instruction(LESS_THAN, (0, 0), -2, 10),
            instruction(0x77, (1, 0), 0, 40),
            instruction(0x0f, (0, 1), 0, 0),
            instruction(JUMP | EXIT, (0, 0), 0, 0),
        ]);
        let who = Task {
            uid: 0,
            owner: 0,
            cgroups: &[1],
            netns: 1,
            tcp: true,
            casts: true,
        };
        let kernel = Kernel::new(who)?;
        let instructions = counting(&program, kernel.stack.range().end)?;
        let (ranges, context) = (kernel.ranges(), kernel.context.range());
        let (returned, tally) = kernel::running(kernel, || execute(&instructions, ranges, &context))?;
        assert_eq!((returned, tally.instructions), (11, 2 + 2 * 10 + 3));
        Ok(())
    }
}
