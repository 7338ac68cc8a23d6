"""What a model remembers of classes whose images are gone: fit on features, draw features."""
