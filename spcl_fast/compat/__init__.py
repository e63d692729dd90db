"""Drop-in faces with other projects' names and signatures: translation, nothing else."""
