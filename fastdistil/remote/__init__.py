"""What lies elsewhere: models on the hub, files on object stores."""
