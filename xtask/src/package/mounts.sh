# shellcheck shell=sh disable=SC2154 # root: who enters sets it
ip link set lo up
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs "$root/run"
mount -t cgroup2 -o nosuid,nodev,noexec none "$root/sys/fs/cgroup"
