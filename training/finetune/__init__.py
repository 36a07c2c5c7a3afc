"""Fine-tuning on pairs of texts: embeddings, rerankers and sparse embeddings, with sentence-transformers' trainers."""
