"""`python -m llmtune.data.store.process FOLDER`: one of the processes that encode rows."""

if __name__ == "__main__":
    from llmtune.working import importing, own_process

    own_process()
    with importing():
        from llmtune.data.store.worker import main
    main()
