"""What a picture shows, as a few plain object names: taggers, and their names as embeddings."""
