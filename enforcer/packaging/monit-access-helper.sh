# To be sourced by the start scripts of BOSH jobs that talk to monit, as /var/vcap/bosh/etc/monit-access-helper.sh:
#
#   source /var/vcap/bosh/etc/monit-access-helper.sh
#   permit_monit_access
#
# Gives the calling shell a cgroup of its own below the one it is in, monit-api-access, and lets in whatever runs there:
# the shell, what it starts, and what it becomes by exec. Nothing else of the same job or service is let in.

permit_monit_access() {
    local mount cgroup
    mount="$(awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts)"
    cgroup="$(sed -n 's/^0:://p' /proc/self/cgroup)"
    if [ -z "${mount}" ] || [ -z "${cgroup}" ]; then
        echo "permit_monit_access: this process is in no cgroup of version 2; mount the hierarchy, or name a user: enforcer grant monit --user USER" >&2
        return 1
    fi
    # Called twice, or below one that has called it: it is there already.
    case "${cgroup}" in
        */monit-api-access | */monit-api-access/*) ;;
        *)
            mount="${mount}${cgroup%/}/monit-api-access"
            # One that is there already may be a user's, who could freeze, kill or join what runs there.
            mkdir "${mount}" 2> /dev/null || true
            case "$(stat -c %u:%A "${mount}" 2> /dev/null)" in
                0:d????-??-?) ;;
                *)
                    echo "permit_monit_access: ${mount} cannot be made, or is not root's alone; run this as root, in a cgroup that is root's" >&2
                    return 1
                    ;;
            esac
            if ! echo "$$" > "${mount}/cgroup.procs"; then
                echo "permit_monit_access: cannot move this process to ${mount}; run this as root, before dropping privileges" >&2
                return 1
            fi
            ;;
    esac
    enforcer enable-monit-access > /dev/null
}
