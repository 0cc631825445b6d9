# What a rented machine does: work, keep the log in S3, and end itself in any case. Above this, make_user_data puts
# JOB (an s3:// URL), MAX_SECONDS, AWS_…, and the words of `python -m helpers`.
trap "shutdown -h now" EXIT
printf '[Service]\nExecStart=/bin/sh -c "shutdown -h now"\n[Install]\nWantedBy=multi-user.target\n' \
    > "${UNITS:-/etc/systemd/system}/end-this-machine.service"
systemctl enable end-this-machine  # at the next boot: this script does not run again then
systemd-run --on-active=$((MAX_SECONDS + 600)) shutdown -h now  # should this script be killed
export HOME=${HOME:-/root} TMPDIR=${TMPDIR:-/var/tmp}  # on the disk: /tmp may be memory, too small for PyTorch
export UPLOAD_EVERY=${UPLOAD_EVERY:-60} VENV=${VENV:-.venv} PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
export AWS_METADATA_SERVICE_NUM_ATTEMPTS=10  # where the instance profile's key comes from
cd "$(mktemp -d)" || exit
exec > >(tee -a log.txt) 2>&1 < /dev/null  # the console shows it, too

copy() {  # get|put NAME: between here and the job's place in S3
    timeout --foreground 120 bootstrap/bin/python - "$@" << 'END'
import os, sys, boto3
bucket, _, prefix = os.environ["JOB"].removeprefix("s3://").partition("/")
move = {"get": boto3.client("s3").download_file, "put": lambda b, k, name: boto3.client("s3").upload_file(name, b, k)}
move[sys.argv[1]](bucket, f"{prefix}/{sys.argv[2]}", sys.argv[2])
END
}

find_python() {  # the first that is new enough and can make environments
    for PYTHON in python3 python3.13 python3.12 python3.11; do
        "$PYTHON" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && return
    done
    return 1
}

work() {
    set -e
    echo "$(date -u +%FT%TZ) $JOB"
    if ! find_python || ! command -v make > /dev/null; then
        if command -v apt-get > /dev/null; then
            for _ in 1 2 3; do apt-get update -q && break || sleep 30; done  # a new machine's own updates may be on
            export DEBIAN_FRONTEND=noninteractive
            apt-get -o DPkg::Lock::Timeout=600 install -yq make python3-venv
            find_python || apt-get -o DPkg::Lock::Timeout=600 install -yq python3.11-venv
        else
            dnf install -yq make tar python3.11
        fi
        find_python
    fi
    "$PYTHON" -m venv bootstrap
    bootstrap/bin/pip install -q boto3
    copy get source.tar.gz
    mkdir project
    tar -xzf source.tar.gz -C project
    cd project
    make PYTHON="$PYTHON" setup
    "$VENV/bin/python" -m helpers "$@"
}

set -m  # each background job is a process group, so that all of it can be ended
while sleep "$UPLOAD_EVERY"; do copy put log.txt 2> /dev/null; done &
uploads=$!
export -f copy find_python work
timeout -k 60 "$MAX_SECONDS" bash -c 'trap : TERM; work "$@"' bash "$@"  # the trap: wait for what is being saved
code=$?
{ kill -- "-$uploads"; wait "$uploads"; } 2> /dev/null  # or an older log may come after the last one
state=failed
[ $code = 0 ] && state=succeeded
[ $code != 0 ] && [ $SECONDS -ge "$MAX_SECONDS" ] && state="timed out"
echo "$(date -u +%FT%TZ) $state, exit code $code"
echo "{\"state\": \"$state\", \"exit_code\": $code}" > status.json
for name in log.txt status.json; do copy put "$name"; done
