"""Checks the installed packages for known vulnerabilities: `make audit`.

Fails only if one is found. If no vulnerability service can be reached (no network), it says so
and succeeds.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PINNED = (ROOT / "requirements.lock", ROOT / "constraints.txt")

# Vulnerability id: why it does not concern Winnow. Remove an entry when its package is upgraded.
IGNORED: Mapping[str, str] = {}

_PIN = re.compile(r"^[A-Za-z0-9._-]+==[^\s;\\]+", re.MULTILINE)
_REQUEST_TIMEOUT_S = 10
_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Outcome:
    """Text to print, and whether the check failed."""

    text: str
    failed: bool


def audit(
    files: Sequence[Path] = PINNED,
    ignored: Mapping[str, str] = IGNORED,
    options: Sequence[str] = (),
) -> Outcome:
    """Look up every `name==version` in `files`; `options` go to pip-audit (such as the service)."""
    try:
        report = _report(pins(files), ignored, options)
        return _outcome(report["dependencies"])
    except (ValueError, subprocess.TimeoutExpired) as error:
        return Outcome(f"audit: nobody could be asked about vulnerabilities: {error}", False)


def pins(files: Sequence[Path]) -> list[str]:
    """`name==version` of every package pinned in `files`."""
    return sorted({pin for file in files for pin in _PIN.findall(file.read_text())})


def _report(wanted: Sequence[str], ignored: Mapping[str, str], options: Sequence[str]) -> Any:  # noqa: ANN401 - JSON
    """Report of pip-audit.  Raises ValueError with its last line of stderr if it has none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(wanted))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps"]
        command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
        command += ["--timeout", str(_REQUEST_TIMEOUT_S)]
        command += [part for name in ignored for part in ("--ignore-vuln", name)]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    if not done.stdout:
        raise ValueError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return json.loads(done.stdout)


def _outcome(dependencies: Sequence[Mapping[str, Any]]) -> Outcome:
    """Raises ValueError if the vulnerability service has no data on any package."""
    lines = [
        f"audit: {dependency['name']} {dependency['version']} has {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
        for dependency in dependencies
        for found in dependency.get("vulns", ())
    ]
    unknown = [dependency["name"] for dependency in dependencies if "skip_reason" in dependency]
    num_known = len(dependencies) - len(unknown)
    if not num_known:
        raise ValueError(f"the index has no data on any of the {len(dependencies)} packages")
    told = f"audit: {num_known} of {len(dependencies)} packages were looked up"
    if unknown:
        told += f"; nothing is known of {', '.join(unknown[:5])}"
        told += f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return Outcome("\n".join([*lines, told]), bool(lines))


if __name__ == "__main__":
    outcome = audit(options=sys.argv[1:])
    sys.stderr.write(f"{outcome.text}\n")
    sys.exit(outcome.failed)
