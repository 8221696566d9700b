"""The report on a training's course: loss, rates, throughput, and what was predicted beside what was measured."""
