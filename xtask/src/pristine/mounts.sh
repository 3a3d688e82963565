# shellcheck shell=sh disable=SC2154 # root, rustup, registry, kernels: who enters sets them
mount -t tmpfs -o nosuid,nodev tmpfs "$root/tmp"
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs "$root/run"
mkdir "$root/run/lock"
[ ! -d /sys/fs/cgroup ] || mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount --bind "$registry" "$root/root/.cargo/registry"
mount --bind "$kernels" "$root/root/.cache/enforcer-vm"
# What is fetched or removed stays in memory, and ends with the run.
mount -t tmpfs tmpfs "$root/mnt"
mkdir "$root/mnt/upper" "$root/mnt/work"
mount -t overlay overlay -o "lowerdir=$rustup,upperdir=$root/mnt/upper,workdir=$root/mnt/work" "$root/root/.rustup"
umount -l "$root/mnt"
for toolchain in "$root"/root/.rustup/toolchains/*; do
    there=$(readlink "$toolchain" || true)
    case $there in
    # A compiler linked by hand is no part of a new machine.
    '' | "$rustup"/*) ;;
    *) rm "$toolchain" ;;
    esac
    # Another name of a toolchain that has its own turn.
    case $there in
    "$rustup"/*)
        ln -sfn "/root/.rustup${there#"$rustup"}" "$toolchain"
        continue
        ;;
    ?*) continue ;;
    esac
    # Nor is the component rust-src.
    lib=$toolchain/lib/rustlib
    rm -rf "$lib/src" "$lib/manifest-rust-src"
    [ ! -e "$lib/components" ] || sed -i /^rust-src/d "$lib/components"
    [ ! -e "$lib/multirust-config.toml" ] || {
        awk '/^\[\[components/ { head = $0; next }
            head != "" { skip = /rust-src/; if (!skip) print head; head = "" }
            /^$/ { skip = 0 }
            !skip' "$lib/multirust-config.toml" >"$lib/config.new"
        mv "$lib/config.new" "$lib/multirust-config.toml"
    }
done
