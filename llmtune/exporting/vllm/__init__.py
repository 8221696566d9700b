"""The tuned model for vLLM: the adapter on its base where vLLM takes all of it, else the merged weights."""
