"""The rules of who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for top in ("winnow", "services", "evals")
    for path in sorted((ROOT / top).rglob("*.py"))
    if "v1" not in path.parts
]
# Each framework's doors: the only files (or folders) that may import it.
DOORS = {
    "ray": (
        "services/gateway/app.py",
        "services/prefill/worker.py",
        "services/decode/replica.py",
        "services/common/ray_registry.py",
        "services/serve.py",
    ),
    "fastapi": ("services/gateway/",),
    "redis": ("services/common/redis_access.py", "services/common/registry.py"),
    "prometheus_client": ("services/common/metrics.py",),
    "opentelemetry": ("services/common/tracing.py",),
    "transformers": (
        "winnow/models.py",
        "winnow/model_files.py",
        "winnow/attention/calls.py",
        "winnow/checkpoint.py",
        "winnow/dry_run.py",
        "winnow/tokenizer.py",
    ),
}
# What each part may import of ours.
OURS = ("winnow", "services", "evals")
BELOW = {
    "winnow": ("winnow",),
    "evals": ("winnow", "evals"),
    "services.common": ("winnow", "services.common"),
    "services.prefill": ("winnow", "services.common", "services.prefill"),
    "services.decode": ("winnow", "services.common", "services.decode"),
}
NETWORK = ("grpc", "socket", "http", "asyncio", "httpx", "uvicorn")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


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


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    part = next((top for top in BELOW if starts_with(module_of(path), top)), None)
    if part is None:
        return
    ours = {name for name in imports(path) if name.split(".")[0] in OURS}
    wrong = {name for name in ours if not any(starts_with(name, ok) for ok in BELOW[part])}
    assert wrong <= {"services"}, f"{module_of(path)} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_frameworks_enter_by_their_doors(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for framework, doors in DOORS.items():
        if any(starts_with(module, framework) for module in imports(path)):
            assert name.startswith(doors), f"{name} imports {framework}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] != "v1"], ids=module_of)
def test_the_library_knows_no_network(path: Path) -> None:
    if starts_with(module_of(path), "winnow"):
        wrong = {name for name in imports(path) if name.split(".")[0] in NETWORK}
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
