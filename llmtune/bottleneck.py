"""Published cards say `import llmtune.bottleneck`: it registers bottleneck adapters with PEFT."""

from llmtune.adapters.bottleneck_layers import BottleneckConfig as BottleneckConfig
