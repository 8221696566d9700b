"""The report shows predicted memory and time beside what was measured."""

from llmtune.reporting.course.memory import memory_section
from llmtune.reporting.course.time import time_section
from llmtune.reporting.history import read_history
from llmtune.timing.predicted import time_record


def test_report_shows_predicted_beside_measured() -> None:
    on_cpu = {"memory": "", "predicted": 4_000_000_000, "resident": 3_000_000_000, "before": 1, "step": 5, "stage": 1}
    section = str(memory_section(read_history([on_cpu])))
    assert all(words in section for words in ("4.0 GB", "3.0 GB", "75%", "above it in most runs"))
    on_gpu = {"memory": "", "predicted": 4e9, "allocated": 4.2e9, "reserved": 4.8e9, "step": 5, "stage": 2}
    section = str(memory_section(read_history([on_gpu])))
    assert all(words in section for words in ("4.2 GB", "105%", "4.8 GB", "reserved"))
    assert memory_section(read_history([{"step": 1, "memory": "", "predicted": "x"}])) is None


def test_report_shows_predicted_time_beside_what_a_training_took() -> None:
    section = str(time_section(read_history([time_record(5, 123.0, 140.4)])))
    assert all(words in section for words in ("2:03", "2:20", "114%", '"minutes"'))
    assert '"seconds"' in str(time_section(read_history([time_record(5, 3.0, 2.0)])))
    assert "of the prediction" in str(time_section(read_history([time_record(5, 0.0, 2.0)])))
    assert time_section(read_history([{"step": 1, "time": "", "predicted_seconds": "x"}])) is None
