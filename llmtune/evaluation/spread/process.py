"""`accelerate launch -m llmtune.evaluation.spread.process RUN`: one process of an evaluation."""

if __name__ == "__main__":
    from llmtune.launch.process import serve_command
    from llmtune.working import importing

    def _main(words: list[str]) -> int:
        with importing():
            from llmtune.evaluation.spread.part import main
        return main(words)

    serve_command(_main)
