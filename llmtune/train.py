"""`accelerate launch -m llmtune.train RECIPE|RUN`: one process of a training."""

import sys

if __name__ == "llmtune.train":
    # As a module it would take the place of the function `llmtune.train`.
    raise ImportError("llmtune.train is a function and a command (python -m llmtune.train), not a module")

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
    quiet_libraries()  # bitsandbytes, which the import below brings, warns when it is imported

    def _main() -> int:
        with importing():
            from llmtune.training.process import main
        return main(sys.argv[1:])

    exit_process(reporting_failures(_main))
