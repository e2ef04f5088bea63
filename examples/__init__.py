"""Small applications that show the library at work; each has a README."""
