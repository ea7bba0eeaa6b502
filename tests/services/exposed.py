"""Reads what a process exposes to Prometheus."""

from prometheus_client.parser import text_string_to_metric_families


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Values by sample name and by labels, those that every sample has left out."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model", "role")}
            found.setdefault(sample.name, {})[tuple(sorted(labels.items()))] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    """One sample's value; 0 if there is none."""
    return samples(text).get(name, {}).get(tuple(sorted(labels.items())), 0.0)
