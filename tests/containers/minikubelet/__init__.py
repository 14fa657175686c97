"""A kubelet of a few hundred lines: runs the pods of rendered manifests through
containerd's CRI, as a node would, without an API server.

What it does not know of a pod it refuses (`strict`), so that nothing of a rendered
manifest is silently not tried. Where it differs from a node on purpose:

* host paths below `Node.host_prefixes` lie in a temporary directory;
* every pod is on the network of the host: there is no CNI plugin here;
* a container that ends is started again after a fraction of a second, not after ten;
* images are those that were imported, whatever their names say of registries.
"""
