# shellcheck shell=bash
set -u
cd /root/enforcer || exit 2
for command in "$@"; do
    echo "pristine: $command"
    began=$SECONDS
    bash -c "$command" || {
        code=$?
        echo "pristine: FAILED ($code) after $((SECONDS - began)) s: $command" >&2
        exit "$code"
    }
    echo "pristine: passed after $((SECONDS - began)) s: $command" >&2
done
