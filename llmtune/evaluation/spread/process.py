"""`accelerate launch -m llmtune.evaluation.spread.process RUN`: one process of an evaluation."""

import sys

if __name__ == "__main__":
    import os

    from llmtune.launch.parent import follow_parent
    from llmtune.launch.process import exit_process, reporting_failures
    from llmtune.launch.quiet import quiet_libraries
    from llmtune.machine.gpus import show_gpus
    from llmtune.working import importing, use_stdout

    follow_parent()
    os.environ.update(show_gpus(os.environ))  # before torch is imported
    use_stdout()
    quiet_libraries()

    def _main() -> int:
        with importing():
            from llmtune.evaluation.spread.part import main
        return main(sys.argv[1:])

    exit_process(reporting_failures(_main))
