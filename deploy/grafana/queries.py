"""PromQL of the panels: each function gives queries by their legends.

`@` stands for the label filters of the dashboard's variables. `by`: labels, with commas between
them, for each of whose values there is a line; `name` comes before them in the legend.
"""

RECENTLY = "$__rate_interval"


def gauge(metric: str, by: str = "", name: str = "", of: str = "sum") -> dict[str, str]:
    """What a gauge says now, over all processes."""
    return {_legend(name, by): _over(of, f"{metric}{{@}}", by)}


def rate(metric: str, by: str = "", name: str = "") -> dict[str, str]:
    """Increase per second."""
    return {_legend(name, by): _increase(metric, by)}


def ratio(metric: str, of: str, by: str = "", window: str = RECENTLY) -> dict[str, str]:
    """What one counter has increased by, of the increase of another."""
    return {_legend("", by): f"{_increase(metric, by, window)} / {_increase(of, by, window)}"}


def mean(metric: str, by: str = "", window: str = RECENTLY) -> dict[str, str]:
    """Mean of a histogram's observations."""
    return ratio(f"{metric}_sum", f"{metric}_count", by, window)


def quantiles(
    metric: str,
    by: str = "",
    levels: tuple[float, ...] = (0.5, 0.9, 0.99),
    name: str = "",
    window: str = RECENTLY,
) -> dict[str, str]:
    """Percentiles of a histogram.  name: in the place of their numbers."""
    buckets = _increase(f"{metric}_bucket", f"le,{by}" if by else "le", window)
    return {
        _legend("", by, name or f"p{100 * level:.0f}"): f"histogram_quantile({level}, {buckets})"
        for level in levels
    }


def _increase(metric: str, by: str, window: str = RECENTLY) -> str:
    return _over("sum", f"rate({metric}{{@}}[{window}])", by)


def _over(operation: str, values: str, by: str) -> str:
    return f"{operation} by ({by}) ({values})" if by else f"{operation}({values})"


def _legend(name: str, by: str, end: str = "") -> str:
    labels = [f"{{{{{label}}}}}" for label in by.split(", ") if label]
    return " ".join(filter(None, [name, *labels, end]))
