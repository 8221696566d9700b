"""A training on a cluster: what it takes of it, one machine's part of it, and the job that SLURM runs."""
