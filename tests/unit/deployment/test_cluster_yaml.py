"""Ray's launcher and EC2 accept cluster.yaml, as far as that can be checked without an AWS account.

Ray checks the file's own keys, and botocore's model of EC2 checks what Ray passes through (`node_config`). moto stands
in for AWS, so that Ray resolves the whole file and launches its machines.
"""

from __future__ import annotations

import copy
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import ray
import yaml
from botocore.model import ListShape, MapShape, Shape, StructureShape
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

import tercet
from support.commands import REPOSITORY

CLUSTER_YAML = REPOSITORY / "cluster.yaml"
Config = dict[str, Any]


def load() -> Config:
    config: Config = yaml.safe_load(CLUSTER_YAML.read_text())
    return config


def options(config: Config) -> str:
    return " ".join(config["docker"]["run_options"])


@pytest.fixture(scope="module")
def run_instances() -> StructureShape:
    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def not_in_enum(value: Any, shape: Shape, at: str) -> Iterator[str]:
    """Values outside EC2's lists of allowed ones; botocore itself lets those through."""
    if isinstance(shape, StructureShape):
        for key in set(value) & set(shape.members):
            yield from not_in_enum(value[key], shape.members[key], f"{at}.{key}")
    elif isinstance(shape, ListShape):
        for i, item in enumerate(value):
            yield from not_in_enum(item, shape.member, f"{at}[{i}]")
    elif not isinstance(shape, MapShape) and getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{at} is {value!r}, which EC2 does not know"


def problems(config: Config, run_instances: StructureShape) -> list[str]:
    """Everything that is wrong with a cluster.yaml, by the three judges that work offline: Ray, EC2, tercet."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (ValidationError, ValueError, AssertionError) as error:
        return [f"ray: {error}"]
    messages: list[str] = []
    for name, node_type in config["available_node_types"].items():
        # Ray adds the counts, and turns its own SubnetIds into the SubnetId of the zone it tries.
        request = {"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}
        report = ParamValidator().validate(request, run_instances)
        if report.has_errors():
            messages.append(f"ec2: {name}: {report.generate_report()}")
        else:
            messages += [f"ec2: {problem}" for problem in not_in_enum(request, run_instances, name)]
        if node_type.get("min_workers", 0) > node_type.get("max_workers", config["max_workers"]):
            messages.append(f"tercet: {name}: min_workers is above max_workers")
        if not node_type["node_config"].get("ImageId"):
            messages.append(f"tercet: {name}: no ImageId, so Ray would take Ubuntu 18.04")
        if not node_type["node_config"].get("IamInstanceProfile"):
            messages.append(f"tercet: {name}: no IamInstanceProfile, so no rights to S3, or to all of it")
    if "-e RAY_AUTH_MODE=token" not in options(config):
        messages.append("tercet: RAY_AUTH_MODE is not set to token in the container")
    return messages


def test_ray_and_ec2_accept_the_file(run_instances: StructureShape) -> None:
    assert problems(load(), run_instances) == []


def test_spot_as_in_the_comment_is_accepted(run_instances: StructureShape) -> None:
    text, count = re.subn(r"# (InstanceMarketOptions: .*)", r"\1", CLUSTER_YAML.read_text())
    assert count == 1
    config = yaml.safe_load(text)
    assert config["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert problems(config, run_instances) == []


def test_efa_as_in_the_comments_is_accepted(run_instances: StructureShape) -> None:
    text = CLUSTER_YAML.read_text()
    head, body = text.split("            # NetworkInterfaces:\n")
    lines = [line.replace("# ", "", 1) for line in body.splitlines()]
    config = yaml.safe_load("\n".join([head + "            NetworkInterfaces:", *lines[:2], *lines[5:7]]))
    machine = config["available_node_types"]["gpu8"]
    assert [interface["InterfaceType"] for interface in machine["node_config"]["NetworkInterfaces"]] == ["efa", "efa"]
    own = ["--device=/dev/infiniband", "-e FI_PROVIDER=efa"]
    # Ray replaces the list of all machines by that of one type.
    assert machine["docker"]["worker_run_options"] == [*own, *load()["docker"]["worker_run_options"]]
    assert problems({**config, **{name: load()[name] for name in load() if name not in config}}, run_instances) == []


def gpu(config: Config) -> Config:
    node_type: Config = config["available_node_types"]["gpu"]
    return node_type


def disk(config: Config) -> Config:
    ebs: Config = gpu(config)["node_config"]["BlockDeviceMappings"][0]["Ebs"]
    return ebs


@pytest.mark.parametrize(
    ("judge", "break_it"),
    [
        pytest.param("ray", lambda c: c.update(idle_timeout_minute=10), id="misspelt key"),
        pytest.param("ray", lambda c: gpu(c).update(max_worker=8), id="misspelt key of a node type"),
        pytest.param("ray", lambda c: gpu(c).pop("resources"), id="node type without resources"),
        pytest.param("ray", lambda c: gpu(c).update(min_workers="0"), id="a number in quotes"),
        pytest.param("ray", lambda c: gpu(c).update(min_workers=9), id="min_workers above the cluster's max"),
        pytest.param("tercet", lambda c: gpu(c).update(min_workers=2, max_workers=1), id="min above max"),
        pytest.param("ray", lambda c: c.update(head_node_type="boss"), id="unknown head type"),
        pytest.param("ray", lambda c: c["docker"].pop("container_name"), id="no container name"),
        pytest.param("ray", lambda c: c["docker"].update(run_option=[]), id="misspelt docker key"),
        pytest.param("ec2", lambda c: gpu(c)["node_config"].update(MinCount="x"), id="count is text"),
        pytest.param("ec2", lambda c: gpu(c)["node_config"].update(InstanceTyp="g6.xlarge"), id="misspelt EC2 key"),
        pytest.param("ec2", lambda c: gpu(c)["node_config"].update(InstanceType="g6.tiny"), id="no such machine"),
        pytest.param("ec2", lambda c: gpu(c)["node_config"].update(IamInstanceProfile="tercet"), id="profile is text"),
        pytest.param("ec2", lambda c: disk(c).update(VolumeSize="200"), id="disk size is text"),
        pytest.param("ec2", lambda c: disk(c).update(VolumeType="gp4"), id="no such disk"),
        pytest.param("tercet", lambda c: gpu(c)["node_config"].pop("ImageId"), id="Ray's own AMI"),
        pytest.param("tercet", lambda c: gpu(c)["node_config"].pop("IamInstanceProfile"), id="no rights to S3"),
        pytest.param("tercet", lambda c: c["docker"].update(run_options=[]), id="no authentication"),
    ],
)
def test_a_broken_file_is_refused(
    judge: str, break_it: Callable[[Config], object], run_instances: StructureShape
) -> None:
    config = load()
    break_it(config)
    messages = problems(config, run_instances)
    assert messages
    assert all(message.startswith(f"{judge}:") for message in messages), messages


def test_nothing_is_filled_in_from_rays_defaults() -> None:
    """Ray takes what the file omits from its defaults.yaml, which installs a nightly build of Ray."""
    ours, filled = load(), prepare_config(load())
    optional = {"file_mounts_sync_continuously", "cluster_synced_files", "rsync_exclude", "rsync_filter"}
    assert set(filled) - set(ours) <= optional | {"upscaling_speed"}
    commands = [line for key, lines in filled.items() if key.endswith("_commands") for line in lines]
    assert not [line for line in commands if "pip install" in line or "conda" in line]


def test_containers_get_the_settings_that_tercet_relies_on() -> None:
    given = dict(re.findall(r"-e (\w+)=(\S+)", options(load())))
    assert given == {
        "RAY_AUTH_MODE": "token",
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


def test_the_names_of_the_settings_are_rays() -> None:
    """Ray ignores a misspelt variable silently, so each name is looked up in the installed Ray."""
    from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR
    from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR

    names = set(re.findall(r"-e (\w+)=", options(load())))
    assert {AUTH_MODE_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR} < names
    raylet = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"
    with raylet.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as core:
        for name in names - {AUTH_MODE_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR}:
            assert core.find(name.removeprefix("RAY_").encode()) >= 0, name


def test_the_token_is_mounted_where_ray_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    monkeypatch.setenv("HOME", "/home/ray")
    assert list(load()["file_mounts"]) == [str(_get_default_token_path())]


def test_the_registry_region_and_version_agree() -> None:
    config = load()
    registry, _, tag = config["docker"]["image"].partition("/")
    assert tag == f"tercet:{tercet.__version__}"
    login = next(line for line in config["initialization_commands"] if "docker login" in line)
    assert login.split()[-1] == registry
    region = config["provider"]["region"]
    assert f"--region {region} " in login
    assert f".{region}." in registry
    assert all(zone.startswith(region) for zone in config["provider"]["availability_zone"].split(","))


def test_checkpoints_are_written_to_the_machines_own_disks() -> None:
    config = load()
    workers = config["docker"]["worker_run_options"]
    [host, inside] = next(option for option in workers if option.startswith("-v ")).split()[1].split(":")
    assert f"-e TMPDIR={inside}" in workers
    assert [line for line in config["initialization_commands"] if line.endswith(host) and "-o 1000" in line]
    assert "--ulimit memlock=-1" in workers
    assert not [option for option in workers if "shm-size" in option]  # Ray adds it, unless it is there


def test_no_secret_is_in_the_file() -> None:
    text = CLUSTER_YAML.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|PRIVATE KEY|RAY_AUTH_TOKEN=|\b[0-9a-f]{64}\b", text, re.I)
    assert "ssh_private_key" not in text


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """AWS, simulated by moto in this process. Ray keeps its key pair in ~/.ssh, so home is a temporary folder."""
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as ray_aws_config
    from ray.autoscaler._private.aws import utils as ray_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Ray keeps clients for the life of the process: none from before, and none of these after.
    caches = (ray_aws.resource_cache, ray_aws.client_cache, ray_aws_config._get_subnets_or_die)
    for cache in caches:
        cache.cache_clear()
    with mock_aws():
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(botocore|boto3|moto).*")
@pytest.mark.filterwarnings("ignore:Could not find AMI:PendingDeprecationWarning")
@pytest.mark.usefixtures("aws")
def test_ray_resolves_the_file_and_launches_its_machines() -> None:
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.commands import _bootstrap_config

    config = _bootstrap_config(load(), no_config_cache=True)
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["resources"]["CPU"] == 4
    assert [types[name]["resources"]["GPU"] for name in ("gpu4", "gpu8")] == [4, 8]
    assert [types[name]["resources"]["CPU"] for name in ("gpu4", "gpu8")] == [48, 192]

    for name in ("tercet-head", "tercet-worker"):  # which the file asks the user to create beforehand
        boto3.client("iam").create_instance_profile(InstanceProfileName=name)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    ami = next(iter(boto3.client("ec2", "us-west-2").describe_images(Owners=["amazon"])["Images"]))["ImageId"]
    worker = {"ray-node-type": "worker"}
    for name, tags in (("head", {"ray-node-type": "head"}), ("gpu", worker), ("gpu4", worker), ("gpu8", worker)):
        node_config = copy.deepcopy(types[name]["node_config"])
        assert node_config["ImageId"].startswith("resolve:ssm:/aws/service/")
        node_config["ImageId"] = ami  # moto does not look ids up in SSM
        provider.create_node(node_config, {**tags, "ray-user-node-type": name}, 1)

    reservations = boto3.client("ec2", "us-west-2").describe_instances()["Reservations"]
    machines = {i["InstanceType"]: i for r in reservations for i in r["Instances"]}
    profiles = {kind: machine["IamInstanceProfile"]["Arn"] for kind, machine in machines.items()}
    assert {kind: arn.rpartition("/")[2] for kind, arn in profiles.items()} == {
        "m7i.xlarge": "tercet-head",
        "g6.xlarge": "tercet-worker",
        "g6.12xlarge": "tercet-worker",
        "p5.48xlarge": "tercet-worker",
    }
    assert all("SpotInstanceRequestId" not in machine for machine in machines.values())
