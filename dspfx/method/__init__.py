"""The papers as pure tensor functions: nothing here knows of models, optimizers or graphs."""
