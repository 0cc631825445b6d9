"""A notebook, as it is, on several processes, on several machines, or on a rented one that ends itself.

    python -m helpers.cloud run 02 -p epochs 3 --processes 2
    python -m helpers.cloud run 02 --nodes 2 --node-rank 0 --rendezvous 10.0.0.1:29500   (and rank 1 on the other one)
    python -m helpers.cloud submit 02 --instance-type g6.xlarge --image-id ami-… --instance-profile … --spot
    python -m helpers.cloud status | logs INSTANCE | terminate INSTANCE

Rented machines are Amazon EC2's; the region and the key are those of the standard AWS environment.
"""

import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import boto3
import nbformat
import papermill
from botocore.exceptions import BotoCoreError, ClientError
from papermill.parameterize import parameterize_notebook

from helpers import run as runner
from helpers import storage

PROJECT = "s3-deep-learning-notebooks"  # the tag by which our machines are known
SCRIPT = Path(__file__).with_name("machine.sh")  # what a rented machine does
PASSED = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_REQUEST_CHECKSUM_CALCULATION",
          "AWS_RESPONSE_CHECKSUM_VALIDATION")  # to a rented machine; its key comes from its instance profile


class CloudError(Exception):
    """One sentence that says what is wrong, and the way out."""


# ------------------------------------------------------------------------------------------------ on a rented machine


@contextmanager
def _told(what):
    try:
        yield
    except (BotoCoreError, ClientError, KeyError) as error:  # KeyError: what answers is no EC2
        raise CloudError(f"{what}: {error!r} (AWS_ENDPOINT_URL is for all services: for an S3 that is not Amazon's set "
                         "AWS_ENDPOINT_URL_S3, and AWS_REGION for the region of the machines).") from None


def submit(notebook, parameters=None, *, image_id, instance_type, instance_profile, key_name=None, security_group=None,
           spot=False, max_hours=8.0, disk=60, processes=None, bucket="deep-learning"):
    """Rent a machine that installs this project, executes the notebook and terminates itself; returns its id.

    It does so however the notebook ends, and after `max_hours` in any case. Source and notebook go to
    s3://{bucket}/jobs/{notebook}/{time}, and there come output.ipynb (as far as it got), log.txt (every minute) and
    status.json. The image needs Python 3.11 or newer, or apt or dnf to install it; `disk` is in GB.
    instance_profile: the name of one that may read and write the bucket, the machine's only key.
    Raises CloudError for whatever is missing, before anything is started, and ValueError for an unknown parameter.
    """
    ec2, iam, s3 = boto3.client("ec2"), boto3.client("iam"), storage.client().meta.endpoint_url
    if _loopback(s3) and not _loopback(ec2.meta.endpoint_url):
        raise CloudError(f"A rented machine cannot reach S3 at {s3}: set AWS_ENDPOINT_URL_S3, or AWS_ACCESS_KEY_ID or "
                         "AWS_PROFILE for Amazon's.")
    parameters = parameters or {}
    runner.select_parameters([notebook], parameters)
    given = parameterize_notebook(papermill.iorw.load_notebook_node(str(notebook)), parameters, kernel_name="python3",
                                  language="python")
    if leaked := storage.redact(nbformat.writes(given))[1]:
        raise CloudError(f"The notebook and its parameters show {', '.join(sorted(leaked))}: take it out.")
    wanted = {f"image {image_id}": lambda: ec2.describe_images(ImageIds=[image_id])["Images"],
              f"instance profile {instance_profile or 'given'} (an IAM role for EC2 that may read and write the bucket)":
                  instance_profile and (lambda: iam.get_instance_profile(InstanceProfileName=instance_profile))}
    if key_name:
        wanted[f"key pair {key_name}"] = lambda: ec2.describe_key_pairs(KeyNames=[key_name])["KeyPairs"]
    if security_group:
        wanted[f"security group {security_group}"] = lambda: ec2.describe_security_groups(
            GroupIds=[security_group])["SecurityGroups"]
    with _told("EC2"):
        if missing := [name for name, look in wanted.items() if not (look and _exists(look))]:
            raise CloudError(f"There is no {', no '.join(missing)} in {ec2.meta.region_name}: make it, or name another.")
        image = ec2.describe_images(ImageIds=[image_id])["Images"][0]
    volumes = {each["DeviceName"]: each.get("Ebs", {}).get("VolumeSize", 0) for each in image["BlockDeviceMappings"]}
    device = image["RootDeviceName"]
    volume = {"VolumeSize": max(disk, volumes.get(device, 0)), "DeleteOnTermination": True}  # no less than the image's

    storage.create_bucket(bucket)
    name = Path(str(notebook)).stem
    job = f"s3://{bucket}/jobs/{name}/{datetime.now(timezone.utc):%Y-%m-%dT%H-%M-%S.%f}"
    storage.write(f"{job}/notebook.ipynb", nbformat.writes(given).encode())
    storage.write(f"{job}/source.tar.gz", _source())
    tags = [{"Key": key, "Value": value} for key, value in (("Name", name), ("Project", PROJECT), ("Job", job))]
    options = {"KeyName": key_name, "SecurityGroupIds": security_group and [security_group],
               "InstanceMarketOptions": spot and {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}}
    with _told(f"EC2 did not start {instance_type}"):
        started = ec2.run_instances(
            ImageId=image_id, InstanceType=instance_type, MinCount=1, MaxCount=1,
            UserData=user_data(job, max_hours, processes),
            IamInstanceProfile={"Name": instance_profile}, InstanceInitiatedShutdownBehavior="terminate",
            MetadataOptions={"HttpTokens": "required"},
            BlockDeviceMappings=[{"DeviceName": device, "Ebs": volume}],
            TagSpecifications=[{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")],
            **{name: value for name, value in options.items() if value})
    return started["Instances"][0]["InstanceId"]


def user_data(job, max_hours, processes=None):
    """The script that the machine runs when it starts (machine.sh) with what it is to do. No secret is in it."""
    run = ["run", f"{job}/notebook.ipynb", "--output", f"{job}/output.ipynb"]
    run += [f"--processes={processes}"] if processes else []
    passed = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    passed["AWS_ENDPOINT_URL_S3"] = storage.client().meta.endpoint_url  # without one there, it would serve its own disk
    lines = [f"export {name}={shlex.quote(value)}" for name, value in passed.items()]
    lines += [f"export JOB={shlex.quote(job)} MAX_SECONDS={max(1, round(max_hours * 3600))}", f"set -- {shlex.join(run)}"]
    return "\n".join(["#!/bin/bash", *lines, SCRIPT.read_text(encoding="utf-8")])


def _loopback(url):
    return re.match(r"https?://(localhost|127\.|\[::1\])", url) is not None


def _exists(look):
    try:
        return bool(look())
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("UnauthorizedOperation", "AccessDenied"):  # who may not look may yet start
            return True
        if "NotFound" in code or "NoSuchEntity" in code or "Malformed" in code:
            return False
        raise


def _source():
    """This project as a tar.gz: what git knows, and would know."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=storage.REPOSITORY, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise CloudError(f"{storage.REPOSITORY} is no git working tree: git tells what to take along.") from None
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name in filter(None, names.split("\0")):
            if (path := storage.REPOSITORY / name).is_file():
                archive.add(path, name)
    return data.getvalue()


def status(instance_id=None):
    """Our machines, or one: [{"instance", "state", "type", "launched", "job", "outcome"}], the newest first.

    outcome: what status.json says: "succeeded", "failed" or "timed out", with an exit code; None as long as it runs, and
    why, in EC2's words, of a machine that was ended from outside.
    """
    which = {"InstanceIds": [instance_id]} if instance_id else {}
    with _told("EC2"):
        pages = boto3.client("ec2").get_paginator("describe_instances").paginate(
            Filters=[{"Name": "tag:Project", "Values": [PROJECT]}], **which)
        found = [one for page in pages for group in page["Reservations"] for one in group["Instances"]]
    if instance_id and not found:
        raise CloudError(f"{instance_id} is no machine of this project.")
    rows = []
    for one in sorted(found, key=lambda one: one["LaunchTime"], reverse=True):
        job, outcome = {tag["Key"]: tag["Value"] for tag in one["Tags"]}["Job"], None
        with suppress(storage.NotFound):
            outcome = json.loads(storage.read(f"{job}/status.json"))
        if outcome is None and one["State"]["Name"] in ("shutting-down", "terminated"):
            outcome = {"state": one.get("StateReason", {}).get("Message", "terminated")}
        rows.append({"instance": one["InstanceId"], "state": one["State"]["Name"], "type": one["InstanceType"],
                     "launched": one["LaunchTime"].isoformat(), "job": job, "outcome": outcome})
    return rows


def logs(instance_id):
    """What the machine has said until the last minute; before it could reach S3, what its console shows."""
    [row] = status(instance_id)
    try:
        return storage.read(f"{row['job']}/log.txt").decode(errors="replace")
    except storage.NotFound:
        with _told("EC2"):
            return boto3.client("ec2").get_console_output(InstanceId=instance_id).get("Output", "")


def terminate(instance_id):
    """End one of our machines now; returns its state."""
    status(instance_id)
    with _told("EC2"):
        ended = boto3.client("ec2").terminate_instances(InstanceIds=[instance_id])
    return ended["TerminatingInstances"][0]["CurrentState"]["Name"]


# ---------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m helpers.cloud", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("run", run), ("submit", submit)):
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        command.add_argument("notebook", help="number, name, path or s3:// URL")
        command.add_argument("-p", nargs=2, action="append", default=[], dest="parameters", metavar=("NAME", "VALUE"))
        command.add_argument("--processes", type=int, help="by default one for each GPU, or one")
        if function is run:
            command.add_argument("-o", "--output", help="where the executed notebook goes; by default into runs/")
            command.add_argument("--nodes", type=int, default=1)
            command.add_argument("--node-rank", type=int, default=0)
            command.add_argument("--rendezvous", metavar="HOST:PORT", help="of the first node")
            continue
        for option in ("image-id", "instance-type", "instance-profile"):
            command.add_argument(f"--{option}", required=option != "instance-profile")
        for option in ("key-name", "security-group"):
            command.add_argument(f"--{option}")
        command.add_argument("--spot", action="store_true", help="at the spot price; may be taken back")
        command.add_argument("--max-hours", type=float, default=8.0)
        command.add_argument("--disk", type=int, default=60, help="GB")
        command.add_argument("--bucket", default="deep-learning")
    for function in (status, logs, terminate):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.add_argument("instance_id", nargs="?" if function is status else None)
    commands.add_parser("process").add_argument("job")  # started by run

    options = vars(parser.parse_args(argv))
    name = options.pop("command")
    if name == "process":
        return process(**json.loads(options["job"]))
    try:
        if name in ("run", "submit"):
            if not options["notebook"].startswith("s3://"):
                [options["notebook"]] = runner.pick([options["notebook"]])
            options["parameters"] = {key: runner.typed(value) for key, value in options["parameters"]}
        if name != "run":
            storage.connect()
        result = globals()[name](**options)
    except ValueError as error:
        parser.error(str(error))
    except (CloudError, storage.StorageError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        return 130
    print(result if isinstance(result, str) else json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
