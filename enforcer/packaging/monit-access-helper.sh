# To be sourced by scripts of BOSH jobs and stemcells that talk to monit, as /var/vcap/bosh/etc/monit-access-helper.sh:
#
#   source /var/vcap/bosh/etc/monit-access-helper.sh
#   permit_monit_access
#
# Gives the calling shell a cgroup of its own below the one it is in, monit-api-access, and allows what runs there: the shell, what it
# starts, and what it becomes by exec. Where that is not possible, a line on stderr says why, and the caller continues: it never fails.

# What rules of earlier stemcells allow (cgroup v1, net_cls), and what their scripts in /etc/network/if-up.d source from here.
monit_isolation_classid=2958295041

permit_monit_access() {
    permit_by_net_cls || true
    # A child of the shell that this runs in, a subshell or not: its parent is what is allowed.
    PATH="${PATH}:/usr/sbin" enforcer enable-monit-access --own-cgroup || true
}

# Such rules may be active beside enforcer's: a connection has to pass both.
permit_by_net_cls() {
    local net_cls
    net_cls="$(awk '$3 == "cgroup" && $4 ~ /(^|,)net_cls(,|$)/ { print $2; exit }' /proc/self/mounts)"
    [ -n "${net_cls}" ] || return 0
    {
        mkdir -p "${net_cls}/monit-api-access" &&
            echo "${monit_isolation_classid}" > "${net_cls}/monit-api-access/net_cls.classid" &&
            sh -c 'echo "${PPID}" > "$1"' sh "${net_cls}/monit-api-access/tasks"
    } 2> /dev/null
}
