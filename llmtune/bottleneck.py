"""Published cards say `import llmtune.bottleneck`; what it registers with PEFT lives in `llmtune.adapters.bottleneck`."""

from llmtune.adapters.bottleneck import BottleneckConfig as BottleneckConfig
