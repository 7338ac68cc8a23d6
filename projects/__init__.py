"""Small studies with the library, one command each."""
