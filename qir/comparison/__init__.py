"""One model on several targets: what differs, layer by layer, and by which rule of which op."""
