"""The rules of who may import whom."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for top in ("winnow", "services", "evals", "winnow_serve")
    for path in sorted((ROOT / top).rglob("*.py"))
    if "v1" not in path.parts
]
# Each framework's doors: the only files (or folders) that may import it.
DOORS = {
    "ray": (
        "services/app.py",
        "services/prefill/worker.py",
        "services/decode/replica.py",
        "services/common/ray_registry.py",
        "services/gateway/prefill/",
        "services/cli/serve.py",
    ),
    "fastapi": ("services/gateway/rest/", "services/app.py"),
    "redis": ("services/common/redis_access.py", "services/common/redis_registry.py"),
    "prometheus_client": ("services/common/metrics.py",),
    "opentelemetry": ("services/common/tracing.py",),
    "transformers": (
        "winnow/models.py",
        "winnow/model_files.py",
        "winnow/other_networks.py",
        "winnow/attention/calls.py",
        "winnow/checkpoint.py",
        "winnow/dry_run.py",
        "winnow/distributed/weights.py",
        "winnow/tokenizer.py",
        "winnow/gguf/tokenizer.py",
        "winnow/quantization/while_loading.py",
    ),
    "gguf": ("winnow/gguf/",),
    "huggingface_hub": ("winnow/hub/",),
    "llguidance": ("winnow/grammar/",),
    "triton": ("winnow/kernels/gpu/",),
}
# What each part may import of ours; of parts within each other the innermost one counts.
OURS = ("winnow", "services", "evals")
_GATEWAY_SHARED = tuple(
    f"services.gateway.{name}"
    for name in (
        *("body", "chat", "client_names", "enforced", "errors", "json_text", "logprobs", "metrics"),
        *("reads", "served_adapters", "served_model", "structured", "tools", "typed", "usage"),
    )
)
_GATEWAY_BASE = ("winnow", "services.common", *_GATEWAY_SHARED)
_DOORS_TO_GATEWAY = ("services.gateway.gateway", "services.gateway.access")
BELOW = {
    "winnow": ("winnow",),
    "evals": ("winnow", "evals"),
    "services.common": ("winnow", "services.common"),
    "services.prefill": ("winnow", "services.common", "services.prefill"),
    "services.decode": ("winnow", "services.common", "services.decode"),
    "services.playground": ("winnow", "services.playground"),
    "services.gateway": (
        *_GATEWAY_BASE,
        "services.gateway.access",
        "services.gateway.quality",
        "services.gateway.request",
    ),
    "services.gateway.metrics": ("services.common", "services.gateway.request.states", "winnow"),
    "services.gateway.request.states": ("winnow.errors",),
    "services.gateway.access": (*_GATEWAY_BASE, "services.gateway.access"),
    "services.gateway.request": (
        *_GATEWAY_BASE,
        "services.gateway.access.request_limits",
        "services.gateway.request",
    ),
    "services.gateway.prefill": ("winnow", "services.common", "services.gateway.prefill"),
    "services.gateway.quality": (
        *_GATEWAY_BASE,
        "services.gateway.request",
        "services.gateway.quality",
    ),
    "services.gateway.rest": (
        *_GATEWAY_BASE,
        *_DOORS_TO_GATEWAY,
        "services.gateway.request",
        "services.gateway.rest",
        "services.playground",
    ),
    "services.gateway.rest.openapi": (
        *_GATEWAY_BASE,
        "services.gateway.rest.bodies",
        "services.gateway.rest.winnow_options",
    ),
    "services.gateway.grpc": (
        *_GATEWAY_BASE,
        *_DOORS_TO_GATEWAY,
        "services.gateway.request",
        "services.gateway.grpc",
    ),
    "services.app": (
        "winnow",
        "services.common",
        "services.prefill",
        "services.decode",
        "services.gateway",
    ),
    "services.deploy_config": ("winnow", "services.common"),
    "services.cli": OURS,
    "winnow_serve": ("services", "winnow_serve"),
}
NETWORK = ("grpc", "socket", "http", "asyncio", "httpx", "uvicorn")
RANKS_PIPES = "winnow.distributed.pipes"  # socket pairs of one machine, whose waiting it limits


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def starts_with(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


MODULES = frozenset(map(module_of, SOURCES))


def imports_of_ours(path: Path) -> set[str]:
    """Modules; not the package that one is only found in."""
    found = imports(path) & MODULES
    tree = ast.walk(ast.parse(path.read_text()))
    packages = {
        node.module
        for node in tree
        if isinstance(node, ast.ImportFrom)
        and all(f"{node.module}.{alias.name}" in MODULES for alias in node.names)
    }
    return found - packages


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    part = max((one for one in BELOW if starts_with(module, one)), key=len, default=None)
    if part is None:
        assert path.name == "__init__.py", f"{module} is in no room"
        return
    wrong = {
        name
        for name in imports_of_ours(path)
        if not any(starts_with(name, ok) for ok in BELOW[part])
    }
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_no_imports_run_in_a_circle() -> None:
    imported = {
        module_of(path): imports_of_ours(path) - {"winnow", module_of(path)} for path in SOURCES
    }
    del imported["winnow"]  # which has the names of modules, and imports them when they are used
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_frameworks_enter_by_their_doors(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for framework, doors in DOORS.items():
        if any(starts_with(module, framework) for module in imports(path)):
            assert name.startswith(doors), f"{name} imports {framework}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] != "v1"], ids=module_of)
def test_the_library_knows_no_network(path: Path) -> None:
    if starts_with(module_of(path), "winnow") and module_of(path) != RANKS_PIPES:
        wrong = {name for name in imports(path) if name.split(".")[0] in NETWORK}
        assert not wrong, f"{module_of(path)} imports {sorted(wrong)}"


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=module_of)
def test_tests_share_helpers_and_not_each_other(path: Path) -> None:
    wrong = {
        name
        for name in imports(path)
        if starts_with(name, "tests") and any(part.startswith("test_") for part in name.split("."))
    }
    assert not wrong, f"{module_of(path)} imports {sorted(wrong)}"


def test_generated_code_has_not_drifted_from_the_proto_files(tmp_path: Path) -> None:
    protos = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto")]
    subprocess.run([*command, *outputs, *protos], check=True)
    generated = {path.name: path.read_text() for path in (tmp_path / "winnow/v1").iterdir()}
    committed = {name: (ROOT / "winnow/v1" / name).read_text() for name in generated}
    assert generated == committed


def test_importing_winnow_does_not_load_torch() -> None:
    code = "import sys, winnow; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
