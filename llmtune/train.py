"""`accelerate launch -m llmtune.train RECIPE|RUN`: one process of a training."""

if __name__ == "llmtune.train":
    # As a module it would take the place of the function `llmtune.train`.
    raise ImportError("llmtune.train is a function and a command (python -m llmtune.train), not a module")

if __name__ == "__main__":
    from llmtune.launch.process import serve_command
    from llmtune.working import importing

    def _main(words: list[str]) -> int:
        with importing():
            from llmtune.training.process import main
        return main(words)

    serve_command(_main)
