"""The program that measures on a phone, and how it is built."""
