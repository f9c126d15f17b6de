"""Fine-tuning of cut networks: the only room where anything is trained."""
