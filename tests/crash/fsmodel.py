# SPDX-License-Identifier: Apache-2.0
"""What a disk may hold after the power went, from a recording of recorder.c.

The model is POSIX at its least, not what one file system happens to do:

- A page (4 KiB) that was written since its file was last synced holds any of
  its versions: the synced one or that after any of the writes; pages
  independently of each other (dropped, kept, reordered). A torn page mixes
  versions sector by sector (512 bytes), hence nothing inside one sector tears.
- The length of a file is any of those it had since its last sync. What lies
  inside the length and was never written is zero.
- Data written through a descriptor with O_DSYNC is there when write returns.
- A name that was made, removed or moved is as before or as after until its
  directory was synced (both, for a move between two), each name on its own;
  a move is atomic. What needs an earlier change of names that was lost is lost
  too. Syncing a file says nothing about its name.
- Everything before the last sync is there.

A call that was cut off may have had any part of its effect.
"""
import os
import struct

PAGE, SECTOR = 4096, 512
MAGIC = 0x56455654
(CREATE, WRITE, TRUNCATE, ALLOCATE, SYNC, DATASYNC, SYNC_RANGE, RENAME, UNLINK,
 MKDIR, RMDIR, LINK) = range(1, 13)
MARK = 100
# What the kernel adds to the path of an open file without a name: scratch, of
# which a power cut leaves nothing.
UNLINKED = " (deleted)"
HEAD = struct.Struct("<IIQQQIIII")
DSYNC, IS_DIR = 1, 2


class Event:
    __slots__ = ("op", "ino", "off", "len", "flags", "path", "path2", "data",
                 "call")


def read_log(path):
    events = []
    with open(path, "rb") as f:
        raw = f.read()
    at = 0
    while at < len(raw):
        e = Event()
        (magic, e.op, e.ino, e.off, e.len, e.flags, a, b,
         n) = HEAD.unpack_from(raw, at)
        assert magic == MAGIC, f"log damaged at {at}"
        e.call, e.flags = e.flags >> 8, e.flags & 0xff
        at += HEAD.size
        e.path = raw[at:at + a].decode()
        e.path2 = raw[at + a:at + a + b].decode()
        at += a + b
        e.data = raw[at:at + n]
        at += n
        events.append(e)
    return events


def append_mark(log, text):
    """Notes that a command has begun or has been acknowledged."""
    t = text.encode()
    with open(log, "ab") as f:
        f.write(HEAD.pack(MAGIC, MARK, 0, 0, 0, 0, len(t), 0, 0) + t)


class File:
    """Synced pages, and the versions since."""

    def __init__(self):
        self.disk = {}       # page number -> bytes
        self.now = {}        # page number -> bytes, the page cache
        self.versions = {}   # page number -> [bytes], oldest first
        self.size = 0        # synced
        self.sizes = []      # since then
        self.size_now = 0

    def page_now(self, p):
        return self.now.get(p) or self.disk.get(p) or bytes(PAGE)

    def set_size(self, n):
        if n < self.size_now:
            for p in set(self.now) | set(self.disk):
                if (p + 1) * PAGE > n:
                    keep = max(0, n - p * PAGE)
                    self.put_page(p, self.page_now(p)[:keep] +
                                  bytes(PAGE - keep))
        if n != self.size_now:
            self.size_now = n
            self.sizes.append(n)

    def put_page(self, p, data):
        self.now[p] = data
        self.versions.setdefault(p, []).append(data)

    def write(self, off, data):
        at = 0
        while at < len(data):
            p, inside = divmod(off + at, PAGE)
            n = min(PAGE - inside, len(data) - at)
            old = self.page_now(p)
            self.put_page(p, old[:inside] + data[at:at + n] +
                          old[inside + n:])
            at += n
        if off + len(data) > self.size_now:
            self.set_size(off + len(data))

    def sync_page(self, p):
        if p in self.versions:
            self.disk[p] = self.versions.pop(p)[-1]
            self.now.pop(p, None)

    def sync(self):
        for p in list(self.versions):
            self.sync_page(p)
        self.size, self.sizes = self.size_now, []

    def is_clean(self):
        return not self.versions and not self.sizes

    def content(self, pick, pick_size):
        """pick(page, choices) -> bytes, pick_size(choices) -> int."""
        size = pick_size([self.size] + self.sizes) if self.sizes else self.size
        pages = {p: d for p, d in self.disk.items()}
        for p, v in self.versions.items():
            pages[p] = pick(p, [self.disk.get(p) or bytes(PAGE)] + v)
        out = bytearray(size)
        for p, d in pages.items():
            if p * PAGE < size:
                out[p * PAGE:min((p + 1) * PAGE, size)] = \
                    d[:size - p * PAGE]
        return bytes(out)


class Change:
    """One change of names: removes and adds entries, waits for its
    directories."""

    def __init__(self, removes, adds, waits):
        self.removes = removes   # [(directory node, name, node)]
        self.adds = adds         # [(directory node, name, node)]
        self.waits = set(waits)  # directories not synced since

    def keys(self):
        return ({(id(d), n) for d, n, _ in self.removes + self.adds}
                | {id(x) for _, _, x in self.removes + self.adds})


class Dir:
    def __init__(self):
        self.disk = {}  # name -> File or Dir
        self.now = {}


class Disk:
    def __init__(self, root):
        self.root_path = root
        self.root = Dir()
        self.changes = []

    # ---- names ----

    def find(self, path):
        """Node of a path as the running system sees it, or None."""
        node = self.root
        rel = os.path.relpath(path, self.root_path)
        if rel == ".":
            return node
        for part in rel.split("/"):
            if not isinstance(node, Dir) or part not in node.now:
                return None
            node = node.now[part]
        return node

    def parent(self, path):
        return self.find(os.path.dirname(path)), os.path.basename(path)

    def change(self, removes, adds):
        for d, n, _ in removes:
            d.now.pop(n, None)
        for d, n, x in adds:
            d.now[n] = x
        self.changes.append(Change(removes, adds,
                                   [d for d, _, _ in removes + adds]))

    def sync_dir(self, d):
        left = []
        for c in self.changes:
            c.waits.discard(d)
            if c.waits:
                left.append(c)
                continue
            for p, n, x in c.removes:
                if p.disk.get(n) is x:
                    del p.disk[n]
            for p, n, x in c.adds:
                p.disk[n] = x
        self.changes = left

    # ---- events ----

    def begin(self, e):
        """The effect of a call that may be cut off: nothing is synced yet."""
        if e.path.endswith(UNLINKED):
            return
        if e.op in (CREATE, MKDIR):
            d, n = self.parent(e.path)
            self.change([], [(d, n, File() if e.op == CREATE else Dir())])
        elif e.op in (UNLINK, RMDIR):
            d, n = self.parent(e.path)
            self.change([(d, n, d.now[n])], [])
        elif e.op == RENAME:
            a, n = self.parent(e.path)
            b, m = self.parent(e.path2)
            node = a.now[n]
            gone = [(a, n, node)]
            if m in b.now:
                gone.append((b, m, b.now[m]))
            self.change(gone, [(b, m, node)])
        elif e.op == LINK:
            b, m = self.parent(e.path2)
            self.change([], [(b, m, self.find(e.path))])
        elif e.op == WRITE:
            self.file(e).write(e.off, e.data)
        elif e.op == TRUNCATE:
            self.file(e).set_size(e.len)
        elif e.op == ALLOCATE:
            f = self.file(e)
            f.set_size(max(f.size_now, e.off + e.len))

    def file(self, e):
        f = self.find(e.path)
        assert isinstance(f, File), f"{e.path} is not in the model"
        return f

    def end(self, e):
        """What is certain once the call has returned."""
        if e.path.endswith(UNLINKED):
            return
        if e.op in (SYNC, DATASYNC):
            node = self.find(e.path)
            if isinstance(node, Dir):
                self.sync_dir(node)
            elif node is not None:
                node.sync()
        elif e.op == WRITE and e.flags & DSYNC:
            f = self.file(e)
            for p in range(e.off // PAGE, (e.off + e.len - 1) // PAGE + 1):
                f.sync_page(p)
            if e.off + e.len > f.size:
                f.size, f.sizes = f.size_now, []

    # ---- images ----

    def pending_names(self):
        return len(self.changes)

    def dirty(self):
        """Files with anything unsynced that are visible in any way."""
        seen, out = set(), []

        def walk(node):
            if id(node) in seen:
                return
            seen.add(id(node))
            if isinstance(node, Dir):
                for x in list(node.disk.values()) + list(node.now.values()):
                    walk(x)
            elif not node.is_clean():
                out.append(node)
        walk(self.root)
        return out

    def tree(self, keep):
        """Names after the crash: {directory: {name: node}}; keep(i) says
        whether pending change i reached the disk."""
        names, lost = {}, set()

        def of(d):
            if id(d) not in names:
                names[id(d)] = dict(d.disk)
            return names[id(d)]
        for i, c in enumerate(self.changes):
            if not keep(i) or c.keys() & lost:
                lost |= c.keys()
                continue
            for d, n, x in c.removes:
                if of(d).get(n) is x:
                    del of(d)[n]
            for d, n, x in c.adds:
                of(d)[n] = x

        def walk(d):
            out = {}
            for n, x in (names.get(id(d)) or d.disk).items():
                out[n] = walk(x) if isinstance(x, Dir) else x
            return out
        return walk(self.root)

    def image(self, keep, pick, pick_size):
        """{relative path: bytes or None for a directory}"""
        out = {}

        def walk(t, at):
            for n, x in sorted(t.items()):
                p = os.path.join(at, n)
                if isinstance(x, dict):
                    out[p] = None
                    walk(x, p)
                else:
                    out[p] = x.content(
                        lambda page, v, f=x: pick(f, page, v),
                        lambda v, f=x: pick_size(f, v))
        walk(self.tree(keep), "")
        return out

    # ---- kinds of images ----

    def everything(self):
        return self.image(lambda i: True, lambda f, p, v: v[-1],
                          lambda f, v: v[-1])

    def nothing(self, names=False):
        return self.image(lambda i: names, lambda f, p, v: v[0],
                          lambda f, v: v[0])

    def kept_or_lost(self, rng, names=True):
        """Whole pages, each of any version; names as they were, or mixed."""
        chance = rng.choice((0.1, 0.5, 0.9))
        return self.image(
            (lambda i: rng.random() < chance) if names else (lambda i: True),
            lambda f, p, v: v[-1] if rng.random() < chance else rng.choice(v),
            lambda f, v: rng.choice(v))

    def torn(self, rng):
        def pick(f, p, v):
            if rng.random() < 0.5:
                return rng.choice(v)
            return b"".join(rng.choice(v)[s:s + SECTOR]
                            for s in range(0, PAGE, SECTOR))
        return self.image(lambda i: True, pick, lambda f, v: rng.choice(v))

    def one_lost(self, rng):
        """A single unsynced page did not make it."""
        pages = [(f, p) for f in self.dirty() for p in f.versions]
        one = rng.choice(pages) if pages else None
        return self.image(
            lambda i: True,
            lambda f, p, v: v[0] if one == (f, p) else v[-1],
            lambda f, v: v[-1])

    def one_kept(self, rng):
        pages = [(f, p) for f in self.dirty() for p in f.versions]
        one = rng.choice(pages) if pages else None
        return self.image(
            lambda i: True,
            lambda f, p, v: v[-1] if one == (f, p) else v[0],
            lambda f, v: v[-1])

    def names_mixed(self, rng):
        """Data as written, each name change kept or lost."""
        chance = rng.choice((0.2, 0.5, 0.8))
        return self.image(lambda i: rng.random() < chance,
                          lambda f, p, v: v[-1], lambda f, v: v[-1])

    def name_lost(self, rng):
        one = rng.randrange(len(self.changes)) if self.changes else -1
        return self.image(lambda i: i != one, lambda f, p, v: v[-1],
                          lambda f, v: v[-1])
