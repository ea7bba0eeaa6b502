"""The Helm chart renders what Kubernetes takes, for every example and every switch."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.common.settings import Settings
from services.decode.metrics import DecodeMetrics
from services.gateway.metrics import GatewayMetrics
from services.prefill.metrics import PrefillMetrics
from tests.deploy.chart import CHART, helm

EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
VERSIONS = ("1.27", "1.30", "1.34", "1.37")
CUSTOM = {"ray.io", "monitoring.coreos.com", "keda.sh", "gateway.networking.k8s.io"}
RAY = ["mode=rayservice", "ray.operatorNamespace=kuberay"]
EVERY_METRICS = (GatewayMetrics, PrefillMetrics, DecodeMetrics)
SWITCHES: dict[str, list[str]] = {
    "everything": [
        "gateway.ingress.enabled=true",
        "gateway.ingress.host=winnow.example.org",
        "gateway.ingress.className=nginx",
        "gateway.ingress.tlsSecret=tls",
        "gateway.httpRoute.enabled=true",
        "gateway.httpRoute.parentRefs[0].name=edge",
        "model.volume.size=10Gi",
        "model.volume.storageClassName=fast",
        "monitoring.podMonitor=true",
        "monitoring.prometheusRule=true",
        "monitoring.dashboards=true",
        "prefill.autoscaling.kind=hpa",
        "decode.autoscaling.kind=hpa",
    ],
    "keda": [
        "prefill.autoscaling.kind=keda",
        "decode.autoscaling.kind=keda",
        "monitoring.prometheusUrl=http://prometheus:9090",
    ],
    "tls": ["gateway.tlsSecret=public", "peerTlsSecret=peers", "gateway.apiKeysSecret=keys"],
    "tls and a key for the test": [
        "gateway.tlsSecret=public",
        "gateway.apiKeysSecret=keys",
        "gateway.testKeySecret=key",
    ],
    "ray with tls": [*RAY, "gateway.tlsSecret=public", "peerTlsSecret=peers"],
    "ray": [*RAY, "prefill.replicas=3", "prefill.podAnnotations.a=b"],
    "ray upgraded step by step": [
        *RAY,
        "ray.upgradeStrategy=NewClusterWithIncrementalUpgrade",
        "ray.incrementalUpgrade.gatewayClassName=istio",
    ],
    "ray with Redis of its own": [
        *RAY,
        "redis.existingSecret=ours",
        "ray.gcsRedisAddress=redis://ours:6379",
    ],
    "external Redis": ["redis.existingSecret=ours", "redis.caSecret=authority"],
    "bare": ["networkPolicy.enabled=false", "serviceAccount.create=false"],
    "claim, on MIG slices": [
        "model.volume.existingClaim=models",
        "model.source=/models/x",
        "model.device=cuda",
        "gpu.resource=nvidia.com/mig-3g.40gb",
        "prefill.gpus=1",
        "decode.gpus=1",
    ],
    "hub model": [
        "model.source=org/name:Q4_K_M",
        "model.revision=v1",
        "model.volume.size=100Gi",
        "model.hub.tokenSecret=hub",
        "model.hub.endpoint=https://hub.example.org",
    ],
    "hub model, cached for Ray": [
        *RAY,
        "model.source=org/name",
        "model.hub.offline=true",
        "model.volume.existingClaim=models",
        "model.volume.readOnly=true",
    ],
    "copied into a claim": [
        "model.source=gs://bucket/path/name",
        "model.volume.existingClaim=models",
        "model.fetch.image=google/cloud-sdk:slim",
        "model.fetch.command={gcloud,storage,rsync,$(MODEL_SOURCE),$(MODEL_TARGET)}",
    ],
    "adapters of every origin": [
        "model.source=s3://bucket/model",
        "model.fetch.image=amazon/aws-cli:2.17.0",
        "model.fetch.envFromSecret=s3-access",
        "model.hub.tokenSecret=hub",
        "adapters.sources.support=/models/support",
        "adapters.sources.team/law=s3://bucket/path/law",
        "adapters.sources.med=org/med@v1",
        "adapters.maxAdapters=4",
        "adapters.maxRank=32",
    ],
    "adapters, on Ray": [*RAY, "adapters.sources.med=org/med"],
    "settings": ["settings.request_timeout_s=600", "pruning.kv_budget=64", "model.name=tiny"],
}
CASES = {path.stem: ["-f", str(path)] for path in EXAMPLES} | {
    name: [flag for change in changes for flag in ("--set", change)]
    for name, changes in SWITCHES.items()
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    done = helm("template", "release", str(CHART), "--namespace", "ns", *CASES[request.param])
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


@pytest.mark.parametrize("name", CASES)
def test_lints(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), *CASES[name])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_it(rendered: list[dict[str, Any]], version: str) -> None:
    for manifest in rendered:
        if manifest["apiVersion"].split("/")[0] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
    for _, template in pod_templates(rendered):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {"name": "p", **pod["metadata"]}
        kubernetes_validate.validate(pod, version, strict=True)


def pod_templates(manifests: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that the chart runs, wherever it stands."""
    for manifest in manifests:
        spec, kind = manifest.get("spec", {}), manifest["kind"]
        if kind in ("Deployment", "StatefulSet"):
            yield kind, spec["template"]
        elif kind == "Pod":
            yield kind, {"metadata": manifest["metadata"], "spec": spec}
        elif kind == "RayService":
            cluster = spec["rayClusterConfig"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                yield kind, group["template"]


def containers(
    manifests: Iterable[dict[str, Any]],
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for kind, template in pod_templates(manifests):
        for container in template["spec"].get("initContainers", ()):
            yield "Init", template, container
        for container in template["spec"]["containers"]:
            yield kind, template, container


def test_every_container_is_probed_bounded_and_confined(rendered: list[dict[str, Any]]) -> None:
    for kind, template, container in containers(rendered):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # else WINNOW_PORT is the cluster's
        if kind not in ("Pod", "Init"):
            assert container.keys() >= {"startupProbe", "livenessProbe"}
            # KubeRay adds a worker's, which asks Serve's proxy; only while it has none.
            component = template["metadata"]["labels"]["app.kubernetes.io/component"]
            is_ray_worker = (kind, component) == ("RayService", "serve")
            assert ("readinessProbe" in container) != is_ray_worker


def test_selectors_find_pods(rendered: list[dict[str, Any]]) -> None:
    labels = [template["metadata"]["labels"] for _, template in pod_templates(rendered)]

    def found(selector: dict[str, str]) -> bool:
        return any(selector.items() <= own.items() for own in labels)

    for manifest in rendered:
        spec, kind = manifest.get("spec", {}), manifest["kind"]
        if kind == "Service":
            assert found(spec["selector"]), manifest["metadata"]["name"]
        elif kind in ("Deployment", "StatefulSet"):
            chosen = spec["selector"]["matchLabels"]
            assert chosen.items() <= spec["template"]["metadata"]["labels"].items()
        elif kind in ("PodDisruptionBudget", "PodMonitor"):
            assert found(spec["selector"]["matchLabels"])
        elif kind == "NetworkPolicy":
            assert found(spec["podSelector"]["matchLabels"])


def test_whatever_is_named_exists(rendered: list[dict[str, Any]]) -> None:
    names = {(m["kind"], m["metadata"]["name"]) for m in rendered}
    names |= {
        ("Service", m["spec"]["serveService"]["metadata"]["name"])
        for m in rendered
        if m["kind"] == "RayService"
    }
    given = {
        ("Secret", "ours"),
        ("Secret", "authority"),
        ("Secret", "public"),
        ("Secret", "peers"),
        ("Secret", "keys"),
        ("Secret", "key"),
        ("Secret", "hub"),
        ("Secret", "s3-access"),
        ("PersistentVolumeClaim", "models"),
        ("ServiceAccount", "default"),
    }
    ports = {
        (template["metadata"]["labels"]["app.kubernetes.io/component"], port["name"])
        for _, template, container in containers(rendered)
        for port in container.get("ports", ())
    }
    for _, template, container in containers(rendered):
        assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names | given
        sources = [one["valueFrom"] for one in container.get("env", ()) if "valueFrom" in one]
        secrets = [one["secretKeyRef"] for one in sources if "secretKeyRef" in one]
        secrets += [one["secretRef"] for one in container.get("envFrom", ())]
        assert {("Secret", secret["name"]) for secret in secrets} <= names | given
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes.keys()
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or ("PersistentVolumeClaim", claim) in names | given
            secret = volume.get("secret", {}).get("secretName")
            assert secret is None or ("Secret", secret) in names | given
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            used = container.get(probe, {})
            numbers = {port["containerPort"] for port in container.get("ports", ())}
            assert "grpc" not in used or used["grpc"]["port"] in numbers
    for manifest in rendered:
        if manifest["kind"] == "Service":
            component = manifest["spec"]["selector"]["app.kubernetes.io/component"]
            for port in manifest["spec"]["ports"]:
                assert (component, port["targetPort"]) in ports
        if manifest["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = manifest["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) in names
        if manifest["kind"] == "Ingress":
            backend = manifest["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
            assert ("Service", backend["name"]) in names
        if manifest["kind"] == "HTTPRoute":
            (backend,) = manifest["spec"]["rules"][0]["backendRefs"]
            assert ("Service", backend["name"]) in names
        if manifest["kind"] == "PodMonitor":
            named = {port for _, port in ports}
            assert {e["port"] for e in manifest["spec"]["podMetricsEndpoints"]} <= named
        if manifest["kind"] == "NetworkPolicy":
            labels = manifest["spec"]["podSelector"]["matchLabels"]
            own = {port for part, port in ports if part == labels["app.kubernetes.io/component"]}
            asked = [p for rule in manifest["spec"]["ingress"] for p in rule.get("ports", ())]
            assert {p["port"] for p in asked if isinstance(p["port"], str)} <= own


def test_what_scales_on_a_metric_names_one_of_winnows(rendered: list[dict[str, Any]]) -> None:
    known = {metric.name for metrics in EVERY_METRICS for metric in metrics("m").described}
    for manifest in rendered:
        if manifest["kind"] == "HorizontalPodAutoscaler":
            (metric,) = manifest["spec"]["metrics"]
            assert metric["pods"]["metric"]["name"] in known
        if manifest["kind"] == "ScaledObject":
            query = manifest["spec"]["triggers"][0]["metadata"]["query"]
            assert set(re.findall(r"winnow_\w+", query.split("{")[0])) <= known


def test_decode_is_drained_before_it_is_stopped(rendered: list[dict[str, Any]]) -> None:
    (pod,) = [m["spec"]["template"]["spec"] for m in rendered if m["kind"] == "StatefulSet"]
    (container,) = pod["containers"]
    *_, program, target, _, timeout = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, target) == ("drain", "localhost:7000")
    assert float(timeout) < pod["terminationGracePeriodSeconds"]


def test_with_tls_no_probe_speaks_plain_text() -> None:
    done = helm("template", "r", str(CHART), *CASES["tls"])
    for _, template, container in containers(m for m in yaml.safe_load_all(done.stdout) if m):
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if component == "decode":
                assert container[probe]["exec"]["command"][:2] == ["winnow", "health"]
            elif component == "serve":
                assert container[probe]["httpGet"]["scheme"] == "HTTPS"


def test_every_setting_is_one_of_winnows(rendered: list[dict[str, Any]]) -> None:
    """Winnow refuses unknown variables, so a wrong one would keep pods from starting."""
    known = {f"WINNOW_{name.upper()}" for name in Settings.model_fields}
    for _, _, container in containers(rendered):
        set_here = [v["name"] for v in container.get("env", ()) if v["name"].startswith("WINNOW_")]
        assert set(set_here) <= known
        assert len(set_here) == len(set(set_here))


def test_every_worker_gets_the_charts_dtype_of_keys_and_values() -> None:
    done = helm("template", "r", str(CHART), "--set", "model.kvDtype=int8")
    workloads = [m for m in yaml.safe_load_all(done.stdout) if m and "Deployment" in m["kind"]]
    found = [
        v["value"]
        for _, _, container in containers(workloads)
        for v in container.get("env", ())
        if v["name"] == "WINNOW_KV_DTYPE"
    ]
    assert found and set(found) == {"int8"}


def loaders(flags: list[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """The pods that load the model: what fetches it, what serves it, and their volumes."""
    done = helm("template", "r", str(CHART), *flags)
    for _, template in pod_templates(m for m in yaml.safe_load_all(done.stdout) if m):
        pod = template["spec"]
        if "initContainers" in pod:
            (fetching,), (serving,) = pod["initContainers"], pod["containers"]
            yield fetching, serving, {volume["name"]: volume for volume in pod["volumes"]}


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


def mounts(container: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    found = container["volumeMounts"]
    return {one["name"]: (one["mountPath"], one.get("readOnly", False)) for one in found}


@pytest.mark.parametrize(
    ("case", "program", "source", "volume"),
    [
        (
            "s3-model",
            ["aws", "s3", "sync", "--no-progress"],
            "s3://models/Llama-3.1-8B-Instruct",
            {"name": "models", "emptyDir": {}},
        ),
        (
            "copied into a claim",
            ["gcloud", "storage", "rsync"],
            "gs://bucket/path/name",
            {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
        ),
    ],
)
def test_a_model_from_elsewhere_is_copied_before_it_is_loaded(
    case: str, program: list[str], source: str, volume: dict[str, Any]
) -> None:
    pods = list(loaders(CASES[case]))
    assert len(pods) == 2  # gateway with prefill, and decode
    for fetching, serving, volumes in pods:
        assert fetching["command"] == [*program, "$(MODEL_SOURCE)", "$(MODEL_TARGET)"]
        told = variables(fetching)
        assert told["MODEL_SOURCE"] == source
        assert told["MODEL_TARGET"] == variables(serving)["WINNOW_MODEL"]
        assert told["MODEL_TARGET"] == f"/models/{source.rpartition('/')[2]}"
        assert mounts(fetching)["models"] == ("/models", False)
        assert mounts(serving)["models"] == ("/models", True)
        assert volumes["models"] == volume


def test_one_object_is_copied_as_one() -> None:
    values = ("model.source=s3://b/m.Q4_0.gguf", "model.fetch.image=i")
    pods = list(loaders([flag for value in values for flag in ("--set", value)]))
    assert [fetching["command"][:3] for fetching, _, _ in pods] == [["aws", "s3", "cp"]] * 2


@pytest.mark.parametrize(
    ("flags", "home", "is_read_only"),
    [
        (CASES["hub model"], "/models", False),
        (CASES["hub model, cached for Ray"], "/models", True),
        (CASES["ray-cluster"], "/models", False),
        (["--set", "model.source=org/name"], "/tmp/huggingface", False),
    ],
    ids=["claim", "read-only claim", "example", "no volume"],
)
def test_a_hub_model_is_fetched_before_it_is_loaded(
    flags: list[str], home: str, is_read_only: bool
) -> None:
    pods = list(loaders(flags))
    assert len(pods) >= 2
    for fetching, serving, volumes in pods:
        assert fetching["args"] == ["fetch"]
        for container in (fetching, serving):
            assert variables(container)["HF_HOME"] == home
            name = "models" if "models" in volumes else "tmp"
            mounted, read_only = mounts(container)[name]
            assert home.startswith(mounted)
            assert read_only == is_read_only
        claim = volumes.get("models", {}).get("persistentVolumeClaim", {})
        assert claim.get("readOnly", False) == is_read_only
        told = variables(fetching)
        assert told["WINNOW_MODEL"] == variables(serving)["WINNOW_MODEL"]
        assert told.get("HF_HUB_OFFLINE") == ("1" if is_read_only else None)


@pytest.mark.parametrize("mode", [[], RAY], ids=["deployment", "Ray"])
def test_adapters_come_before_winnow_starts(mode: list[str]) -> None:
    flags = [flag for change in mode for flag in ("--set", change)]
    done = helm("template", "r", str(CHART), *CASES["adapters of every origin"], *flags)
    pods = [
        template["spec"]
        for _, template in pod_templates(m for m in yaml.safe_load_all(done.stdout) if m)
        if "initContainers" in template["spec"]
    ]
    assert len(pods) == (3 if mode else 2)
    for pod in pods:
        fetching = {one["name"]: one for one in pod["initContainers"]}
        assert list(fetching) == ["fetch-model", "fetch-adapter-0", "fetch-adapter-1"]
        hub, copied = fetching["fetch-adapter-0"], fetching["fetch-adapter-1"]
        files = ["adapter_config.json", "adapter_model.safetensors"]
        where = ["--local-dir", "/adapters/med", "--revision", "v1"]
        assert hub["command"] == ["hf", "download", "org/med", *files, *where]
        assert variables(hub)["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
        assert copied["command"][:3] == ["aws", "s3", "sync"]
        told = variables(copied)
        assert told["MODEL_SOURCE"] == "s3://bucket/path/law"
        assert told["MODEL_TARGET"] == "/adapters/team/law"
        assert copied["envFrom"] == fetching["fetch-model"]["envFrom"]
        (serving,) = pod["containers"]
        assert mounts(serving)["adapters"] == ("/adapters", True)
        assert mounts(hub)["adapters"] == mounts(copied)["adapters"] == ("/adapters", False)
        assert {"name": "adapters", "emptyDir": {}} in pod["volumes"]


def test_winnow_is_told_of_adapters() -> None:
    """What the chart says is what Winnow reads."""
    done = helm("template", "r", str(CHART), *CASES["adapters of every origin"])
    workloads = [m for m in yaml.safe_load_all(done.stdout) if m and "Service" not in m["kind"]]
    told = [
        {name: value for name, value in variables(container).items() if "ADAPTER" in name}
        for _, _, container in containers(workloads)
        if container["name"] in ("serve", "decode")
    ]
    assert len(told) == 2
    for one in told:
        settings = Settings(
            adapters=one["WINNOW_ADAPTERS"],
            max_adapters=one["WINNOW_MAX_ADAPTERS"],
            max_adapter_rank=one["WINNOW_MAX_ADAPTER_RANK"],
        )
        assert {name: str(folder) for name, folder in settings.adapters.items()} == {
            "support": "/models/support",
            "team/law": "/adapters/team/law",
            "med": "/adapters/med",
        }
        assert (settings.max_adapters, settings.max_adapter_rank) == (4, 32)
    plain = helm("template", "r", str(CHART), "--set", "adapters.sources.a=/models/a")
    assert "ADAPTER" not in helm("template", "r", str(CHART)).stdout
    assert "MAX_ADAPTER" not in plain.stdout
    assert "/adapters" not in plain.stdout


def test_the_hub_is_told_who_asks_for_what() -> None:
    for containers_of_pod in loaders(CASES["hub model"]):
        for container in containers_of_pod[:2]:
            told = variables(container)
            assert told["WINNOW_REVISION"] == "v1"
            assert told["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
            assert told["HF_ENDPOINT"] == "https://hub.example.org"


@pytest.mark.parametrize(
    ("values", "of_other_ranks"),
    [([], []), (CASES["gpu-pools"], [{"port": 7002, "endPort": 7004}])],
    ids=["one process", "four ranks"],
)
def test_only_gateway_and_prefill_reach_decode(
    values: list[str], of_other_ranks: list[dict[str, int]]
) -> None:
    done = helm("template", "r", str(CHART), *values)
    policies = [m for m in yaml.safe_load_all(done.stdout) if m and m["kind"] == "NetworkPolicy"]
    (decode,) = [p for p in policies if p["metadata"]["name"] == "r-winnow-decode"]
    inner, metrics = decode["spec"]["ingress"]
    peers = [p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in inner["from"]]
    assert peers == ["serve", "head"]
    assert inner["ports"] == [{"port": "grpc"}, {"port": "kv"}, *of_other_ranks]
    assert metrics == {"from": [{"namespaceSelector": {}}], "ports": [{"port": "metrics"}]}


def test_only_its_own_pods_and_the_operator_reach_ray() -> None:
    done = helm("template", "r", str(CHART), *CASES["ray"])
    manifests = {
        (m["kind"], m["metadata"]["name"]): m for m in yaml.safe_load_all(done.stdout) if m
    }
    for component in ("serve", "head"):
        policy = manifests["NetworkPolicy", f"r-winnow-{component}"]
        api, metrics, ray = policy["spec"]["ingress"]
        assert all(isinstance(port["port"], int) for port in api["ports"])
        assert {port["port"] for port in metrics["ports"]} == {"gateway-metrics", "prefill-metrics"}
        *own, operator = ray["from"]
        parts = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in own]
        assert parts == ["serve", "head"]
        assert not any("namespaceSelector" in peer for peer in own)
        namespace = operator["namespaceSelector"]["matchLabels"]
        assert namespace == {"kubernetes.io/metadata.name": "kuberay"}
        assert operator["podSelector"]["matchLabels"]


def test_ray_asks_for_a_token(rendered: list[dict[str, Any]]) -> None:
    """And no pod says otherwise."""
    for manifest in rendered:
        if manifest["kind"] == "RayService":
            assert manifest["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    for _, _, container in containers(rendered):
        assert "RAY_AUTH_MODE" not in {variable["name"] for variable in container.get("env", ())}


def test_only_scrapers_reach_what_operators_ask() -> None:
    team = "networkPolicy.scrapers[0].namespaceSelector.matchLabels.team=ops"
    done = helm("template", "r", str(CHART), "--set", team)
    manifests = [m for m in yaml.safe_load_all(done.stdout) if m]
    (serve,) = [
        m["spec"]["ingress"]
        for m in manifests
        if (m["kind"], m["metadata"]["name"]) == ("NetworkPolicy", "r-winnow-serve")
    ]
    api, admin = serve
    assert api == {"ports": [{"port": 8000}, {"port": 8001}]}
    assert admin["from"] == [{"namespaceSelector": {"matchLabels": {"team": "ops"}}}]
    names = ("gateway-metrics", "prefill-metrics", "admin")
    assert admin["ports"] == [{"port": name} for name in names]
    services = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "Service"}
    assert [port["name"] for port in services["r-winnow"]["ports"]] == ["http", "grpc"]
    assert services["r-winnow-admin"]["type"] == "ClusterIP"


def test_a_pod_outlives_its_drain_and_its_lease() -> None:
    done = helm("template", "r", str(CHART), "--set", "decode.drainTimeoutSeconds=77")
    manifests = [m for m in yaml.safe_load_all(done.stdout) if m]
    (decode,) = [m for m in manifests if m["kind"] == "StatefulSet"]
    pod = decode["spec"]["template"]["spec"]
    variables = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    drain_s, lease_s = (float(variables[f"WINNOW_{n}_S"]) for n in ("DRAIN_TIMEOUT", "LEASE"))
    assert drain_s == 77
    assert pod["terminationGracePeriodSeconds"] > drain_s + lease_s


def test_a_pool_of_gpu_nodes_gets_its_pods_alone() -> None:
    done = helm("template", "r", str(CHART), *CASES["gpu-pools"])
    values = yaml.safe_load((CHART / "examples/gpu-pools.yaml").read_text())
    parts = {"serve": values["prefill"], "decode": values["decode"]}
    for _, template, container in containers(m for m in yaml.safe_load_all(done.stdout) if m):
        pod = template["spec"]
        part = parts.get(template["metadata"]["labels"]["app.kubernetes.io/component"])
        if part is None or template["spec"].get("restartPolicy") == "Never":
            assert not {"runtimeClassName", "nodeSelector", "affinity"} & pod.keys()
            assert "nvidia.com/gpu" not in container["resources"]["limits"]
            continue
        assert container["image"].endswith("-cuda")
        assert container["resources"]["limits"]["nvidia.com/gpu"] == part["gpus"]
        ranks = [v["value"] for v in container["env"] if v["name"].endswith("TENSOR_PARALLEL")]
        assert ranks == [str(part["gpus"])]
        assert pod["runtimeClassName"] == "nvidia"
        for name in ("nodeSelector", "tolerations", "affinity"):
            assert pod.get(name) == part.get(name)
        (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
        assert shm == {"medium": "Memory", "sizeLimit": part["sharedMemory"]}
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        probe, limit_s = container["startupProbe"], part["startupTimeoutSeconds"]
        assert probe["periodSeconds"] * probe["failureThreshold"] == limit_s
        if part is parts["serve"]:
            assert variables(container)["WINNOW_START_TIMEOUT_S"] == f"{0.9 * limit_s:g}"


def test_a_ray_pod_has_its_time_to_start() -> None:
    changes = [*RAY, "prefill.startupTimeoutSeconds=900"]
    flags = itertools.chain.from_iterable(("--set", change) for change in changes)
    done = helm("template", "r", str(CHART), *flags)
    times = {
        template["metadata"]["labels"]["app.kubernetes.io/component"]: (
            container["startupProbe"]["periodSeconds"]
            * container["startupProbe"]["failureThreshold"]
        )
        for _, template, container in containers(m for m in yaml.safe_load_all(done.stdout) if m)
        if container["name"] == "ray"
    }
    assert times == {"head": 300, "serve": 900}


def test_alerts_and_dashboards_are_the_shared_ones() -> None:
    done = helm("template", "r", str(CHART), "-f", str(CHART / "examples/gpu-node.yaml"))
    manifests = [m for m in yaml.safe_load_all(done.stdout) if m]
    (rule,) = [m for m in manifests if m["kind"] == "PrometheusRule"]
    alerts = CHART.parents[1] / "deploy/prometheus/alerts.yaml"
    assert rule["spec"] == yaml.safe_load(alerts.read_text())
    shown = {
        name: json.loads(text)
        for m in manifests
        if m["kind"] == "ConfigMap"
        for name, text in m["data"].items()
    }
    folder = CHART.parents[1] / "deploy/grafana/dashboards"
    assert shown == {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["mode=magic"], "/mode"),
        (["decode.replicas=0"], "/decode/replicas"),
        (["decode.replica=2"], "replica"),
        (["redis.enabled=false"], "/redis/existingSecret"),
        (["redis.caSecret=ca"], "redis.caSecret is for the Redis of redis.existingSecret"),
        (["gateway.ingress.enabled=true"], "/gateway/ingress/host"),
        (["gateway.httpRoute.enabled=true"], "/gateway/httpRoute/parentRefs"),
        (["settings.port=3"], "port"),
        (["settings.admin_port=3"], "admin_port"),
        (["settings.tensor_parallel=2"], "tensor_parallel"),  # follows from gpus
        (["networkPolicy.scrapers=null"], "scrapers"),  # an empty list would be everybody
        (["model.device=tpu"], "/model/device"),
        (["model.device=cuda:1"], "/model/device"),  # CUDA_VISIBLE_DEVICES chooses a GPU
        (["model.device=cuda:0", "prefill.gpus=2", "decode.gpus=2"], "/model/device"),
        (["model.device=cuda", "prefill.gpus=65", "decode.gpus=1"], "/prefill/gpus"),
        (["settings.start_timeout_s=9"], "start_timeout_s"),
        (["model.kvDtype=int4"], "/model/kvDtype"),
        (["settings.kv_dtype=int8"], "kv_dtype"),
        (["model.device=cuda", "prefill.gpus=1"], "/decode/gpus"),
        (["prefill.gpus=1"], "/prefill/gpus"),  # it would be held and not used
        (["gpu.resource=gpu"], "/gpu/resource"),
        (["decode.affinity=x"], "/decode/affinity"),
        (["decode.startupTimeoutSeconds=5"], "/decode/startupTimeoutSeconds"),
        (["decode.kvMemoryBytes=lots"], "/decode/kvMemoryBytes"),
        (["mode=rayservice"], "ray.operatorNamespace is needed"),
        ([*RAY, "redis.existingSecret=s"], "ray.gcsRedisAddress is needed"),
        (["decode.autoscaling.kind=keda"], "monitoring.prometheusUrl is needed"),
        (["mode=rayservice", "prefill.autoscaling.kind=hpa"], "works in mode deployment"),
        (["settings.prefill_replicas=2"], "prefill_replicas"),
        (["settings.revision=v1"], "revision"),
        (["model.revision=a@b"], "/model/revision"),
        (["model.hub.endpoint=hub"], "/model/hub/endpoint"),
        (["model.source=s3://b/x"], "model.fetch.image needs an image"),
        (["settings.max_adapters=2"], "max_adapters"),
        (["adapters.sources.a b=/models/a"], "invalid propertyName 'a b'"),
        (["adapters.sources.a=models/a/b"], "/adapters/sources/a"),
        (["adapters.sources.a=/models/a b"], "/adapters/sources/a"),
        (["adapters.maxAdapters=257"], "/adapters/maxAdapters"),
        (
            ["adapters.maxAdapters=1", "adapters.sources.a=/m/a", "adapters.sources.b=/m/b"],
            "adapters.maxAdapters is 1; adapters.sources names 2",
        ),
        (["adapters.sources.a=s3://b/x"], "adapters.sources.a is an address: model.fetch.image"),
        (
            ["adapters.sources.a=ftp://b/x", "model.fetch.image=i"],
            "adapters.sources.a is neither a folder, nor the hub's",
        ),
        (
            ["adapters.sources.a=org/a", "model.hub.offline=true"],
            "adapters.sources.a is of a hub, but model.hub.offline is set",
        ),
        (["model.source=ftp://b/x", "model.fetch.image=i"], "model.fetch.command must say how"),
        (
            ["model.source=s3://b/x", "model.fetch.image=i", "model.volume.readOnly=true"],
            "model.volume.readOnly is set, but model.source is an address",
        ),
        (
            ["mode=rayservice", "ray.upgradeStrategy=NewClusterWithIncrementalUpgrade"],
            "gatewayClassName is needed",
        ),
    ],
)
def test_bad_values_are_refused_by_name(changes: list[str], complaint: str) -> None:
    flags = itertools.chain.from_iterable(("--set", change) for change in changes)
    done = helm("template", "r", str(CHART), *flags)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_every_value_is_described() -> None:
    text = (CHART / "README.md").read_text()

    def paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            nested = isinstance(value, dict) and value and name not in ("resources", "autoscaling")
            yield from paths(value, f"{prefix}{name}.") if nested else (f"{prefix}{name}",)

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert [path for path in paths(values) if f"`{path}`" not in text] == []
