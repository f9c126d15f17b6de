"""Encoders as they are served, cut without training: embeddings, rerankers, entities, answers, several labels."""
