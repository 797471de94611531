"""The machine that this process runs on: what it is (`hardware`), how fast its kernels are (`profile`, measured by
`probe`), whether it has a C++ compiler that works (`compiler`), and what follows for every setting that is `auto`
(`choices`)."""
