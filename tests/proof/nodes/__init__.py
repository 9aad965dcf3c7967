"""Two nodes on one machine: two network namespaces, a real sshd, two clones."""
