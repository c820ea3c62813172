"""What tests share: data, tiny models, servers, and ways to start and to break a run."""
