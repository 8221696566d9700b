"""Variables that another launcher left in the environment: with them, a process waits for ranks that never come."""

from collections.abc import Mapping, MutableMapping

_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "CROSS_RANK", "CROSS_SIZE"),
    *("NNODES", "NPROC_PER_NODE", "MACHINE_RANK", "CCL_WORKER_COUNT"),
}
_PREFIXES = (
    *("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "DEEPSPEED_", "TORCHELASTIC_", "PET_"),
    *("PMI_", "PMIX_", "PALS_", "MPI_", "MPICH_", "OMPI_", "PRTE_", "MV2_", "HYDRA_", "I_MPI_", "HOROVOD_", "SLURM_"),
)
_KEPT = {"ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE"}
"""A user's own settings, which say nothing of processes."""


def left_by_launchers(environment: Mapping[str, str]) -> list[str]:
    """The names of the variables in an environment by which a launcher tells its processes who they are."""
    return [name for name in environment if name not in _KEPT and (name in _NAMES or name.startswith(_PREFIXES))]


def forget_launchers(environment: MutableMapping[str, str]) -> None:
    """Remove what another launcher left in an environment: what llmtune starts belongs to llmtune's launch alone."""
    for name in left_by_launchers(environment):
        del environment[name]
