"""Whether a job can run as it was launched: looked at by every node and rank, and judged by one for all."""
