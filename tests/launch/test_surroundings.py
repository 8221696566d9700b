"""Variables of other launchers are not passed on to a training, and a user's own settings are."""

import pytest

from llmtune.launch.command import training_environment
from llmtune.launch.surroundings import left_by_launchers

LEFT = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "ROLE_NAME", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"),
    *("ACCELERATE_MIXED_PRECISION", "FSDP_VERSION", "FSDP_ACTIVATION_CHECKPOINTING", "TORCHELASTIC_RUN_ID"),
    *("PET_NNODES", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("MV2_COMM_WORLD_RANK", "MPI_LOCALRANKID", "SLURM_PROCID", "SLURM_NTASKS", "HOROVOD_RANK"),
]
KEPT = [
    *("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"),
    *("OMP_NUM_THREADS", "TORCH_LOGS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_CUDA_ALLOC_CONF"),
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PATH", "LLMTUNE_CACHE", "TMPDIR"),
    *("ACCELERATE_LOG_LEVEL", "TOKENIZERS_PARALLELISM"),
]


def test_passes_on_only_what_belongs_to_this_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*LEFT, *KEPT]:
        monkeypatch.setenv(name, "1")
    child = training_environment(1, 8)
    assert [name for name in LEFT if name in child] == []
    assert [name for name in KEPT if child.get(name) != "1"] == []
    assert left_by_launchers(dict.fromkeys([*KEPT, *LEFT], "1")) == LEFT
