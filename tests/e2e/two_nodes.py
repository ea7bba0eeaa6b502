"""A Ray cluster of two nodes with one core each, as a process of its own.

Prints the cluster's address when it is up; ends when its standard input does. In the process of
the tests, what an earlier `ray.init` left in the environment would get into it.
"""

import sys
from typing import Any

from ray.cluster_utils import Cluster


def main(dashboard_port: int) -> None:
    cluster = Cluster()
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster.add_node(**node, include_dashboard=True, dashboard_port=dashboard_port)
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
