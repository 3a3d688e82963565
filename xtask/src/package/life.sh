# The package's life in a scratch root, with a real supervisor (runit) and a real kernel: nothing may get through from the first
# start to the removal, and nothing of ours may be left after purge. $PACKAGE and $NEXT are the packages.

say() { echo "life: $*"; }
fail() { echo "life: FAILED: $*"; exit 1; }

# The judged processes: a cgroup of their own, so that this host's others are not concerned.
judged=/sys/fs/cgroup/enforcer-package-check
mkdir "$judged"
mount -t bpf -o mode=700,nosuid,nodev,noexec bpf /sys/fs/bpf

# One attempt as nobody in that cgroup. Nobody listens there, so that what is let through is refused by the kernel's TCP.
attempt() {
    sh -c "echo \$\$ >$judged/cgroup.procs; exec setpriv --reuid 65534 --regid 65534 --clear-groups \
        bash -c ': </dev/tcp/127.0.0.1/2822'" 2>&1 | grep -oEm 1 'Operation not permitted|Connection refused' || echo other
}
open() { [ "$(attempt)" = 'Connection refused' ] || fail "$1: $(attempt)"; }
guarded() { [ "$(attempt)" = 'Operation not permitted' ] || fail "$1: $(attempt)"; }
# Attempts without pause; every one that is not denied is written down.
attack() {
    sh -c "echo \$\$ >$judged/cgroup.procs; exec setpriv --reuid 65534 --regid 65534 --clear-groups bash" <<'LOOP'
while :; do
    result=$({ : </dev/tcp/127.0.0.1/2822; } 2>&1)
    case $result in *'Operation not permitted'*) echo >>/tmp/attack/denied ;; *) echo "$result" >>/tmp/attack/through ;; esac
done
LOOP
}
stopped() {
    for _ in $(seq 100); do
        [ -z "$(pgrep -x enforcer)" ] && return
        sleep 0.1
    done
    fail "the daemon does not end"
}

# What a unit's ExecStart says.
command_of() { sed -n 's/^ExecStart=//p' "/lib/systemd/system/$1"; }

open "before installation somebody already refuses"
dpkg -i "$PACKAGE" >/tmp/dpkg.log 2>&1 || fail "dpkg -i: $(cat /tmp/dpkg.log)"
# Without a sign that there is something to guard, neither systemd nor runit starts it; each sign is enough.
starts() { systemd-analyze condition --unit=enforcer.service >/tmp/conditions 2>&1; }
reported() {
    DPKG_MAINTSCRIPT_PACKAGE=enforcer DPKG_MAINTSCRIPT_NAME=postinst sh /var/lib/dpkg/info/enforcer.postinst configure >/tmp/report 2>&1 &&
        grep -q "$1" /tmp/report
}
grep -q 'nothing is enforced: this is no BOSH VM' /tmp/dpkg.log || fail "installed, it says nothing: $(cat /tmp/dpkg.log)"
! starts || fail "its unit starts although nothing is configured: $(cat /tmp/conditions)"
code=0
sh /etc/sv/enforcer/run >/tmp/run 2>&1 || code=$?
[ "$code" = 4 ] || fail "runit's run does not end with 4: $code, $(cat /tmp/run)"
enforcer status >/tmp/status 2>&1 && fail "something is active: $(cat /tmp/status)"
open "installed, not configured"
say "installed where there is no BOSH agent, it enforces nothing until it is configured, and says so"
while read -r sign words; do
    mkdir -p "${sign%/*}"
    touch "$sign"
    starts || fail "$sign is there, and its unit does not start: $(cat /tmp/conditions)"
    reported "$words" || fail "$sign is there, and it says: $(cat /tmp/report)"
    rm "$sign"
    rmdir --ignore-fail-on-non-empty "${sign%/*}"
done <<EOF
/var/vcap/bosh this is a BOSH VM
/etc/enforcer/enforcer.toml the configuration in /etc/enforcer
/etc/enforcer/conf.d/etcd.toml the configuration in /etc/enforcer
/var/lib/enforcer/last-good.json the rules in /var/lib/enforcer
EOF
! starts || fail "a sign is left: $(cat /tmp/conditions)"
say "on a BOSH VM, with a configuration, or with rules that were active before, its unit starts"

mkdir -p /etc/enforcer
cat >/etc/enforcer/enforcer.toml <<EOF
cgroup = "$judged"
backend = "ebpf"
[target.monit]
endpoints = ["tcp://127.0.0.1:2822"]
allow = ["root"]
EOF
open "installed, not started"

# The daemon as its unit confines it, so far as that can be done without systemd: capabilities, no new privileges.
mkdir -p -m 700 /var/lib/enforcer /run/enforcer
capabilities=$(sed -n 's/^CapabilityBoundingSet=//p' /lib/systemd/system/enforcer.service | sed 's/CAP_/+/g; s/ /,/g' | tr A-Z a-z)
[ "$capabilities" = '+bpf,+perfmon,+net_admin' ] || fail "unexpected capabilities $capabilities"
setpriv --bounding-set="-all,$capabilities" --inh-caps=-all --no-new-privs $(command_of enforcer.service) >/tmp/confined.log 2>&1 &
for _ in $(seq 100); do
    enforcer status >/dev/null 2>&1 && break
    sleep 0.1
done
enforcer status >/tmp/status 2>&1 || fail "confined, the daemon does not enforce: $(cat /tmp/confined.log /tmp/status)"
guarded "confined daemon"
say "the daemon enforces with the capabilities of its unit"
grep -q 'writing is confined by Landlock to /' /tmp/confined.log || fail "not confined by Landlock: $(cat /tmp/confined.log)"
say "it confines its own writing"
# It mends what is taken away with those, too.
rm -f /sys/fs/bpf/enforcer/*connect4*
sleep 3
guarded "a link was removed and did not come back: $(ls /sys/fs/bpf/enforcer; cat /tmp/confined.log)"
say "a link that is removed comes back under the same"
# The agent's settings lie on a mount that comes later.
before=$(pgrep -x enforcer)
echo '[bosh]' >>/etc/enforcer/enforcer.toml
kill -HUP "$before"
enforcer check nobody 127.77.0.1:4222 >/dev/null || fail "the bus is guarded before it is known"
mkdir -p /var/vcap/bosh/settings
mount -t tmpfs tmpfs /var/vcap/bosh/settings
echo '{"mbus": "nats://127.77.0.1:4222"}' >/var/vcap/bosh/settings/settings.json
sleep 1
enforcer check nobody 127.77.0.1:4222 >/dev/null && fail "settings on a later mount are not seen: $(cat /tmp/confined.log)"
[ "$(pgrep -x enforcer)" = "$before" ] || fail "another daemon runs: $(cat /tmp/confined.log)"
guarded "after a new mount"
say "the agent's settings on a later mount are seen"
sed -i '/^\[bosh\]$/d' /etc/enforcer/enforcer.toml
kill -TERM "$(pgrep -x enforcer)"
stopped
guarded "after stop"
say "stop leaves enforcement on"
umount /var/vcap/bosh/settings
rm -r /var/vcap
enforcer unload >/dev/null
open "after unload"

# Boot: the early unit's command before anything else, then the supervisor with the daemon.
$(command_of enforcer-early.service) >/tmp/early.log 2>&1 || fail "early: $(cat /tmp/early.log)"
guarded "after the early unit"
say "the early unit's command guards what was known"
mkdir -m 777 /tmp/attack
attack &
mkdir -p /etc/service
ln -s /etc/sv/enforcer /etc/service/enforcer
runsvdir /etc/service >/tmp/runsvdir.log 2>&1 &
for _ in $(seq 100); do
    [ -e /etc/service/enforcer/supervise/ok ] && break
    sleep 0.1
done
sv -w 20 start enforcer >/tmp/sv.log || fail "sv start: $(cat /tmp/sv.log)"
guarded "under runit"
say "under runit, sv start returns when the kernel enforces"
if [ ! -e /tmp/attack ]; then
    mkdir -m 777 /tmp/attack
    attack &
fi
sleep 1
kill -KILL "$(pgrep -x enforcer)"
sleep 3
first=$(pgrep -x enforcer) || fail "runit does not restart it"
say "killed, it is started again"

dpkg -i "$NEXT" >/tmp/dpkg.log 2>&1 || fail "upgrade: $(cat /tmp/dpkg.log)"
sleep 2
second=$(pgrep -x enforcer) || fail "after the upgrade no daemon runs"
[ "$first" != "$second" ] || fail "the upgrade does not restart the daemon"
case $(readlink "/proc/$second/exe") in *deleted*) fail "the old program still runs" ;; esac
grep -q '^backend = "ebpf"$' /etc/enforcer/enforcer.toml || fail "the upgrade loses the configuration"
say "an upgrade restarts the daemon and keeps the configuration"

dpkg -r enforcer >/tmp/dpkg.log 2>&1 || fail "remove: $(cat /tmp/dpkg.log)"
stopped
sleep 1
guarded "after removal"
[ -s /tmp/attack/denied ] || fail "the attacker did nothing"
[ ! -e /tmp/attack/through ] || fail "let through: $(sort /tmp/attack/through | uniq -c)"
say "removal leaves enforcement on; of $(wc -l </tmp/attack/denied) attempts since the start none got through"

dpkg --purge enforcer >/tmp/dpkg.log 2>&1 || fail "purge: $(cat /tmp/dpkg.log)"
open "after purge: $(cat /tmp/dpkg.log)"
# The kernel's own, in each new bpffs, end in .debug.
pins=$(ls -A /sys/fs/bpf | grep -v '\.debug$' || true)
[ -z "$pins" ] || fail "purge leaves pins: $pins"
say "purge removes everything from the kernel"
