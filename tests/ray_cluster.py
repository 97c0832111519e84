"""A Ray cluster of two machines with one CPU each, both of which are this one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ray_cluster() -> Iterator[str]:
    """The address of a cluster that runs during the block."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    # Ray notes the address of a cluster there whatever the folder of the cluster is, and does not make the folder.
    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": folder},
        )
        try:
            cluster.add_node(num_cpus=1)
            yield cluster.address
        finally:
            cluster.shutdown()
