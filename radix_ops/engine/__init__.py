"""What scores, embeds and reranks: models, their inputs and their results, without files or arguments."""
