//! A driver of the storm.

use anyhow::Context;
use domaind_client::{
    Access, AllocRequest, Buffer, Client, Coherent, CoherentSpec, DirectSpec, Direction, DomainId,
    Error, IovaRange, MapSpec, Mapping, Perm, Placement, Role, RuntimeDir, Session, v1,
};
use domaind_tests::P;

use crate::colour::{Colour, PAGES, PRIVATE};
use crate::random::Random;
use crate::reason;
use crate::storm::DOMAIN;
use crate::tally::Tally;

/// Longest streaming mapping and allocation.
const LEN_MAX: u64 = 40_000;
/// Of each kind.
const LIVE_MAX: usize = 5;

struct Driver<'t> {
    session: Session,
    tally: &'t mut Tally,
    random: Random,
    colour: Colour,
    buffer: Buffer,
    mappings: Vec<Mapping>,
    rings: Vec<Coherent>,
    /// Devices work on this memory itself.
    shown: Buffer,
    pieces: Vec<Shown>,
}

/// Pages of `shown` that are mapped.
#[derive(Clone, Copy, Debug)]
struct Shown {
    page: u64,
    pages: u64,
    range: IovaRange,
    /// Not to be used again: its removal was not acknowledged.
    is_lost: bool,
}

pub(crate) async fn run(dir: &RuntimeDir, tally: &mut Tally, seed: u64) -> anyhow::Result<()> {
    let client = Client::connect(dir).await?;
    let domain = DomainId::new(DOMAIN)?;
    let session = client
        .attach(&domain, Role::Driver, Access::ReadWrite)
        .await?;
    let colour = Colour::of_row(seed >> 32);
    let buffer = session.buffer(LEN_MAX).await?;
    buffer.copy_in(0, &vec![colour.byte(); size(buffer.len_bytes())])?;
    let shown = session.buffer(PAGES * P).await?;
    shown.copy_in(0, &vec![PRIVATE; size(PAGES * P)])?;
    let mut driver = Driver {
        session,
        tally,
        random: Random::new(seed),
        colour,
        buffer,
        mappings: Vec::new(),
        rings: Vec::new(),
        shown,
        pieces: Vec::new(),
    };
    while !driver.tally.is_over() {
        driver.cycle().await?;
        driver.tally.counts.cycles += 1;
        driver.tally.write()?;
    }
    driver.finish().await
}

impl Driver<'_> {
    async fn cycle(&mut self) -> anyhow::Result<()> {
        match self.random.below(16) {
            0..6 => self.map().await,
            6..9 => self.allocate().await,
            9..13 => self.show().await,
            13..15 => self.hide().await,
            _ if self.random.one_in(4) => self.clear().await,
            _ => self.sync().await,
        }
    }

    async fn map(&mut self) -> anyhow::Result<()> {
        let len = 1 + self.random.below(LEN_MAX);
        let direction = match self.random.below(3) {
            0 => Direction::ToDevice,
            1 => Direction::FromDevice,
            _ => Direction::Bidirectional,
        };
        let spec = MapSpec::new(self.buffer.memory().id(), 0, len, direction);
        let mapping = match self.session.map(spec).await {
            Ok(mapping) => mapping,
            Err(error) => return self.is_full(error),
        };
        let fresh = match direction {
            Direction::FromDevice => 0,
            _ => self.colour.byte(),
        };
        self.look("a fresh mapping", mapping.range(), |byte| byte == fresh)?;
        self.look_behind(mapping.range())?;
        self.paint(mapping.range())?;
        self.mappings.push(mapping);
        if self.mappings.len() > LIVE_MAX {
            let index = self.random.index(self.mappings.len());
            let mapping = self.mappings.swap_remove(index);
            self.unmap(mapping).await?;
        }
        Ok(())
    }

    async fn unmap(&mut self, mapping: Mapping) -> anyhow::Result<()> {
        let colour = self.colour.byte();
        self.look("a mapping at its end", mapping.range(), |byte| {
            byte == colour
        })?;
        if self.random.one_in(8) {
            // Dropped: unmapped by and by, and nothing flows back.
            return Ok(());
        }
        let written = match mapping.direction() {
            Direction::FromDevice => Some(mapping.len_bytes()),
            _ => None,
        };
        mapping.unmap(written).await.map_err(Error::from)?;
        Ok(())
    }

    /// What flows back in the middle is of the own colour, too.
    async fn sync(&mut self) -> anyhow::Result<()> {
        let Some(mapping) = self.mappings.last() else {
            return Ok(());
        };
        if mapping.direction() != Direction::ToDevice {
            mapping.sync_for_cpu(0, mapping.len_bytes()).await?;
        }
        self.look_at_buffer()
    }

    fn look_at_buffer(&mut self) -> anyhow::Result<()> {
        let mut held = vec![0; size(self.buffer.len_bytes())];
        self.buffer.copy_out(0, &mut held)?;
        let colour = self.colour.byte();
        self.tally
            .check("the buffer", 0, &held, |byte| byte == colour);
        Ok(())
    }

    async fn allocate(&mut self) -> anyhow::Result<()> {
        let spec = CoherentSpec {
            place: AllocRequest {
                len_bytes: 1 + self.random.below(LEN_MAX),
                align_bytes: 0,
                limit: None,
            },
            persistent: false,
        };
        let ring = match self.session.alloc_coherent(spec).await {
            Ok(ring) => ring,
            Err(error) => return self.is_full(error),
        };
        self.look("fresh coherent memory", ring.range(), |byte| byte == 0)?;
        self.paint(ring.range())?;
        self.rings.push(ring);
        if self.rings.len() > LIVE_MAX {
            let index = self.random.index(self.rings.len());
            let ring = self.rings.swap_remove(index);
            self.free(ring).await?;
        }
        Ok(())
    }

    async fn free(&mut self, ring: Coherent) -> anyhow::Result<()> {
        let colour = self.colour.byte();
        self.look("coherent memory at its end", ring.range(), |byte| {
            byte == colour
        })?;
        if self.random.one_in(8) {
            return Ok(());
        }
        let freed = ring.free().await.map_err(Error::from);
        self.is_removed(freed).map(drop)
    }

    /// Maps own memory directly. Until now nobody could reach it.
    async fn show(&mut self) -> anyhow::Result<()> {
        let pages = 1 + self.random.below(4);
        let page = self.random.below(PAGES - pages);
        let ends = |shown: &Shown| page < shown.page + shown.pages && shown.page < page + pages;
        if self.pieces.iter().any(ends) {
            return self.hide().await;
        }
        self.look_at_shown("memory that is not mapped", page, pages, PRIVATE)?;
        self.fill(page, pages, self.colour.byte())?;
        let window = self.colour.window();
        let place = self.random.below(2 * PAGES - pages) * P;
        let start = window.start().checked_add(place).context("in the window")?;
        let spec = DirectSpec {
            memory: self.shown.memory().id(),
            offset: page * P,
            len_bytes: pages * P,
            perm: Perm::ReadWrite,
            placement: Placement::At(start),
        };
        match self.session.map_direct(spec).await {
            Ok(mapping) => self.pieces.push(Shown {
                page,
                pages,
                range: mapping.range,
                is_lost: false,
            }),
            Err(error) => {
                use v1::ErrorReason::{Invalidating, Overlap};
                match reason(&error) {
                    // Something of its own, or of one of that colour that is gone.
                    Overlap | Invalidating => self.fill(page, pages, PRIVATE)?,
                    _ => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Unmaps, and then uses the memory for itself: when that was answered no
    /// device can reach it any more.
    async fn hide(&mut self) -> anyhow::Result<()> {
        let live = |(_, shown): &(usize, &Shown)| !shown.is_lost;
        let live: Vec<usize> = self
            .pieces
            .iter()
            .enumerate()
            .filter(live)
            .map(|(index, _)| index)
            .collect();
        if live.is_empty() {
            return Ok(());
        }
        let index = live[self.random.index(live.len())];
        let unmapped = self.session.unmap_direct(&[self.pieces[index].range]).await;
        if self.is_removed(unmapped)? {
            let shown = self.pieces.swap_remove(index);
            self.take_back(shown)
        } else {
            self.pieces[index].is_lost = true;
            Ok(())
        }
    }

    /// The same with all of its window.
    async fn clear(&mut self) -> anyhow::Result<()> {
        let cleared = self.session.clear_map(&[self.colour.window()]).await;
        let is_removed = self.is_removed(cleared)?;
        for mut shown in std::mem::take(&mut self.pieces) {
            if is_removed && !shown.is_lost {
                self.take_back(shown)?;
            } else {
                shown.is_lost = true;
                self.pieces.push(shown);
            }
        }
        Ok(())
    }

    fn take_back(&mut self, shown: Shown) -> anyhow::Result<()> {
        let Shown { page, pages, .. } = shown;
        let colour = self.colour.byte();
        self.look_at_shown("memory that was mapped", page, pages, colour)?;
        self.fill(page, pages, PRIVATE)
    }

    fn fill(&self, page: u64, pages: u64, byte: u8) -> anyhow::Result<()> {
        let bytes = vec![byte; size(pages * P)];
        Ok(self.shown.copy_in(page * P, &bytes)?)
    }

    fn look_at_shown(
        &mut self,
        what: &str,
        page: u64,
        pages: u64,
        wanted: u8,
    ) -> anyhow::Result<()> {
        let mut bytes = vec![0; size(pages * P)];
        self.shown.copy_out(page * P, &mut bytes)?;
        self.tally
            .check(what, page * P, &bytes, |byte| byte == wanted);
        Ok(())
    }

    async fn finish(mut self) -> anyhow::Result<()> {
        for mapping in std::mem::take(&mut self.mappings) {
            self.unmap(mapping).await?;
        }
        for ring in std::mem::take(&mut self.rings) {
            self.free(ring).await?;
        }
        self.clear().await?;
        self.look_at_buffer()?;
        self.tally.write()?;
        let Driver {
            session,
            buffer,
            shown,
            ..
        } = self;
        drop((buffer, shown));
        Ok(session.detach().await?)
    }

    fn paint(&self, range: IovaRange) -> anyhow::Result<()> {
        let bytes = vec![self.colour.byte(); len_of(range)];
        Ok(self.session.write(range.start(), &bytes)?)
    }

    fn look(
        &mut self,
        what: &str,
        range: IovaRange,
        is_right: impl Fn(u8) -> bool,
    ) -> anyhow::Result<()> {
        let mut bytes = vec![0; len_of(range)];
        self.session.read(range.start(), &mut bytes)?;
        self.tally
            .check(what, range.start().get(), &bytes, is_right);
        Ok(())
    }

    /// The rest of the last granule shows nobody's bytes.
    fn look_behind(&mut self, range: IovaRange) -> anyhow::Result<()> {
        let end = range.last().get() + 1;
        let rest = size(end.next_multiple_of(P) - end);
        let mut bytes = vec![0; rest];
        let start = range.last().checked_add(1).context("below the end")?;
        self.session.read(start, &mut bytes)?;
        self.tally
            .check("behind a fresh mapping", end, &bytes, |byte| byte == 0);
        Ok(())
    }

    /// The apertures are small, so that what is free is used again soon.
    fn is_full(&mut self, error: Error) -> anyhow::Result<()> {
        match reason(&error) {
            v1::ErrorReason::NoSpace => {
                self.tally.counts.full += 1;
                self.mappings.truncate(1);
                self.rings.truncate(1);
                Ok(())
            }
            _ => Err(error.into()),
        }
    }

    /// Whether it can be reached no more.
    fn is_removed<T>(&mut self, removed: Result<T, Error>) -> anyhow::Result<bool> {
        match removed {
            Ok(_) => Ok(true),
            Err(error) if reason(&error) == v1::ErrorReason::NotAcknowledged => {
                self.tally.counts.unacknowledged += 1;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn len_of(range: IovaRange) -> usize {
    size(range.len_bytes().unwrap_or(0))
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64 bits")
}
