"""What every shape and form costs on a target: which products to time, a kit that times them there, and here."""
