"""The pack on disk: its layout, its reader and writer; and the reader of Hugging Face's safetensors folders."""
