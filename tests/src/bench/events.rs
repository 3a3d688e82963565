//! The ring buffer of denials, emptied as the daemon does: where it is full a denial costs less, as its event is lost.

use anyhow::Result;
use aya::maps::{Map, MapData, RingBuf};

use crate::world::{World, maps_name};

/// Those of a world.
pub(super) struct Events(RingBuf<MapData>);

impl Events {
    pub(super) fn open(world: &World) -> Result<Self> {
        let pin = world.pins().join(maps_name()).join("events");
        Ok(Self(RingBuf::try_from(Map::RingBuf(MapData::from_pin(pin)?))?))
    }

    /// Takes all out, and says how many they were.
    pub(super) fn drain(&mut self) -> usize {
        std::iter::from_fn(|| self.0.next().map(drop)).count()
    }
}
