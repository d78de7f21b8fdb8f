"""Jobs over whole datasets on a Ray cluster: building shards, tagging, upscaling, evaluation."""
